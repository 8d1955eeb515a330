"""What the programs need of torch.distributed. Every function also works in a single process without any set-up."""
import argparse
import contextlib
import datetime
import inspect
import os
import re
import sys
import time
from typing import Any, Dict, Iterator, List, Mapping, Optional

import torch
import torch.distributed as dist

from util.errors import InputError, accept_all_characters

GLOO_SETTLES_S = 0.1  # far more than its threads need to let go of a few tensors


def is_dist_avail_and_initialized() -> bool:
    """Whether this process is part of an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes, 1 outside a process group."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """Number of this process over all nodes, 0 outside a process group."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def get_local_rank() -> int:
    """Number of this process on its node, as torchrun or srun says."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", get_rank())))


def is_main_process() -> bool:
    """Whether this is the process that writes files and talks to the console."""
    return get_rank() == 0


def print_main(*values: Any) -> None:
    """`print`, flushed, on the main process only; characters that the output's encoding lacks are written as escapes."""
    if is_main_process():
        accept_all_characters(sys.stdout)  # of callers outside our programs too
        print(*values, flush=True)


def barrier() -> None:
    """Wait for all processes."""
    if is_dist_avail_and_initialized():
        # NCCL would else guess a process's device by its rank, which is wrong where a process sees its own GPU alone.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """Let the first process of each node run the block before its others: for downloads into a shared cache."""
    first = get_local_rank() == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def all_gather(data: Any) -> List[Any]:
    """Collect a picklable object of any size from every process; the list is in order of rank."""
    if get_world_size() == 1:
        return [data]
    gathered: List[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, data)
    return gathered


@torch.no_grad()
def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes (the tensor itself when there is one)."""
    if get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


@torch.no_grad()
def reduce_dict(input_dict: Dict[str, torch.Tensor], average: bool = True) -> Dict[str, torch.Tensor]:
    """Reduce a dict of scalar tensors over all processes with one collective; every process gets the result.

    All processes must hold the same keys. Without a process group the values come back as they are.
    """
    if get_world_size() == 1 or not input_dict:
        return input_dict
    names = sorted(input_dict)
    values = torch.stack([input_dict[name].detach().float() for name in names])
    dist.all_reduce(values)
    if average:
        values /= get_world_size()
    reduced = dict(zip(names, values.unbind()))
    return {name: reduced[name] for name in input_dict}


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Join the process group that a launcher describes in the environment, if any.

    Understands torchrun and torch.distributed.launch (RANK, WORLD_SIZE, LOCAL_RANK) and srun (SLURM_PROCID,
    SLURM_STEP_NUM_TASKS, SLURM_LOCALID; see `slurm_rendezvous` for how its processes find each other).
    Sets `args.distributed`, `args.rank`, `args.world_size`, `args.gpu`; CUDA processes use NCCL, others gloo. The GPU of
    `--device cuda:1`, or of several processes each one's own, becomes the current one.

    Raises:
        InputError: there is no such GPU, or not one for each process.
    """
    environment = os.environ
    by_slurm = False
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", getattr(args, "local_rank", None) or 0))
        alone = world_size == 1 or environment.get("LOCAL_WORLD_SIZE") == "1"
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        by_slurm = True
        rank, world_size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        local_rank = int(environment["SLURM_LOCALID"])
        alone = False
    else:
        if getattr(args, "world_size", 1) > 1:
            raise InputError(f"--world_size {args.world_size} needs that many processes: start main.py through torchrun, "
                             "which sets RANK and WORLD_SIZE")
        if "SLURM_STEP_ID" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
            print_main(f"this Slurm job has {environment['SLURM_NTASKS']} tasks, but this process was started without "
                       "srun and runs alone")
        args.distributed, args.rank, args.world_size, args.gpu = False, 0, 1, 0
        if _is_cuda(args):
            args.gpu = _use_gpu(args, 0)
        return
    args.distributed, args.rank, args.world_size, args.gpu = True, rank, world_size, local_rank
    options: Dict[str, Any] = {}
    use_cuda = _is_cuda(args)
    if use_cuda:
        if torch.device(args.device).index is not None and not alone:
            raise InputError(f"--device {args.device} names one GPU, but {world_size} processes run, each on a GPU of its own: "
                             "pass --device cuda")
        args.gpu = _use_gpu(args, None if alone else _gpu_of(rank, local_rank, torch.cuda.device_count(), by_slurm))
        if "device_id" in inspect.signature(dist.init_process_group).parameters:
            options["device_id"] = torch.device("cuda", args.gpu)
    url = slurm_rendezvous(environment) if by_slurm and args.dist_url == "env://" else args.dist_url
    dist.init_process_group("nccl" if use_cuda else "gloo", init_method=url, world_size=world_size, rank=rank,
                            timeout=datetime.timedelta(seconds=getattr(args, "dist_timeout", 1800)), **options)
    print_main(f"distributed: {world_size} processes, {dist.get_backend()}, {url}")


def _is_cuda(args: argparse.Namespace) -> bool:
    return torch.device(getattr(args, "device", None) or "cpu").type == "cuda"


def _use_gpu(args: argparse.Namespace, usual: Optional[int]) -> int:
    """Make the GPU that `args.device` names, else the usual one (the first for None), the current one; returns its number.
    Memory figures, random states and streams are then that GPU's, too."""
    named = torch.device(args.device).index
    gpu = usual or 0 if named is None else named
    visible = torch.cuda.device_count()
    if gpu >= visible:
        raise InputError(f"--device {args.device}: this machine shows {visible} GPUs, numbered from 0 on")
    torch.cuda.set_device(gpu)
    return gpu


def _gpu_of(rank: int, local_rank: int, visible: int, by_slurm: bool) -> int:
    # Slurm (`--gpus-per-task`, `--gpu-bind`) and other launchers show every process its own GPU alone.
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip(" ,")
    if visible == 1 and (by_slurm or shown and "," not in shown):
        return 0
    if local_rank >= visible:
        raise InputError(f"process {rank} needs GPU {local_rank} but this machine has {visible}: "
                         "start fewer processes per node or pass --device cpu")
    return local_rank


def slurm_rendezvous(environment: Mapping[str, str]) -> str:
    """Where the processes of a job step meet, as `tcp://host:port`, worked out alike by each of them.

    The host is that of process 0, the first of the step's nodes. The port lies in 20000 … 29999 and depends on the job,
    the step and how often the job was requeued, so that a requeued job doesn't meet what is left of its former run.
    MASTER_ADDR and MASTER_PORT are used instead where they are set.
    """
    job, step, restart = (int(environment.get(f"SLURM_{name}", "0")) for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    port = environment.get("MASTER_PORT") or 20000 + (101 * job + 11 * step + restart) % 10000
    return f"tcp://{host}:{port}"


def first_host(node_list: str) -> str:
    """The first name in Slurm's short way of writing names: "gpu[07-09,12],cpu1" begins with gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def shutdown() -> None:
    """Leave the process group, if this process is in one; every process must call this."""
    if not is_dist_avail_and_initialized():
        return
    if dist.get_backend() == "gloo":
        # Gloo's threads need the interpreter's lock to let go of the last collective's tensors, but older torch (before
        # its pull request 154976) holds it while it waits for these threads to end: let them finish first.
        dist.barrier()
        time.sleep(GLOO_SETTLES_S)
    dist.destroy_process_group()
