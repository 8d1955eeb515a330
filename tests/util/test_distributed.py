"""Two real processes with gloo, started by torchrun, and the same functions without any process group."""
import argparse
import os
import subprocess
import sys

import pytest
import torch

from tests.util import distributed_worker
from util import distributed
from util.errors import InputError


@pytest.fixture(scope="module")
def two(tmp_path_factory, root):
    """Findings of both processes, with what they printed and the order in which they passed `local_main_first`."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(root / "tests" / "util" / "distributed_worker.py"), str(folder)],
                            cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {"ranks": ranks, "stdout": result.stdout, "order": (folder / "order").read_text()}


def both(two, name):
    return [rank[name] for rank in two["ranks"]]


def test_launcher_is_understood(two):
    assert both(two, "args") == [[True, 0, 2, 0], [True, 1, 2, 1]]
    assert both(two, "state") == [[True, 2, True], [True, 2, False]]
    assert both(two, "left") == [[False, 1, 0]] * 2


def test_all_gather_takes_objects_of_any_size_in_order(two):
    expected = [{"rank": rank, "values": list(range(1 + 1000 * rank))} for rank in range(2)]
    assert both(two, "gathered") == [expected, expected]


def test_reduce_dict(two):
    assert both(two, "mean") == [{"a": 5, "b": 2}] * 2
    assert both(two, "sum") == [{"a": 10, "b": 4}] * 2
    assert both(two, "kept") == [{"a": 0, "b": 1}, {"a": 10, "b": 3}], "the arguments stay as they were"


def test_reduce_sum(two):
    assert both(two, "reduced") == [[2, 1]] * 2
    assert both(two, "reduced_kept") == [[1, 0], [1, 1]]


def test_averages_are_over_all_values_however_they_are_shared_out(two):
    # Process 0 saw 1, 2, 3, process 1 saw 10: 16 / 4, not the mean (2 + 10) / 2 of two means. One meter is process 1's.
    assert both(two, "averages") == [{"loss": 4, "seldom": 4}] * 2


def test_only_the_main_process_prints(two):
    assert two["stdout"].count("printed by the main process") == 1
    assert two["stdout"].count("distributed: 2 processes, gloo, env://") == 1
    assert two["stdout"].count("Test:  [0/3]") == 1 and two["stdout"].count("Test:  Total time") == 1


def test_the_first_process_of_a_node_goes_ahead(two):
    assert two["order"] == "01"


def test_gradients_of_two_processes_average_to_those_of_one(two):
    """Also where one process has no object at all: normalisers are those of the whole batch."""
    inputs, targets = distributed_worker.batch()
    assert [len(target["labels"]) for target in targets[2:]] == [0, 0]
    loss, gradient = distributed_worker.loss_and_gradient(inputs, targets)
    torch.testing.assert_close(sum(both(two, "gradient")) / 2, gradient, rtol=1e-5, atol=1e-6)
    assert sum(both(two, "loss")) / 2 == pytest.approx(loss, rel=1e-5)


# One process.


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS",
                 "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_without_any_set_up(no_launcher, capsys):
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    assert not distributed.is_dist_avail_and_initialized()
    assert distributed.all_gather("anything") == ["anything"]
    losses = {"a": torch.tensor(1.0)}
    assert distributed.reduce_dict(losses) is losses
    distributed.barrier()
    with distributed.local_main_first():
        distributed.print_main("hello", 3)
    distributed.shutdown()
    assert capsys.readouterr().out == "hello 3\n"


def test_no_launcher_means_one_process(no_launcher):
    args = argparse.Namespace(device="cpu", dist_url="env://", world_size=1)
    distributed.init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, args.gpu) == (False, 0, 1, 0)


def test_several_processes_need_a_launcher(no_launcher):
    args = argparse.Namespace(device="cpu", dist_url="env://", world_size=4)
    with pytest.raises(InputError, match="^--world_size 4 needs that many processes: start main.py through torchrun"):
        distributed.init_distributed_mode(args)


SLURM_STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}


def test_slurm_is_understood(no_launcher, monkeypatch, capsys):
    """A step of one task has a rank too; a job's script, started once whatever its tasks, isn't a step."""
    for environment in ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, {"SLURM_NTASKS": "2"}):
        with monkeypatch.context() as slurm:
            for name, value in {"SLURM_PROCID": "0", **environment}.items():
                slurm.setenv(name, value)
            args = argparse.Namespace(device="cpu", dist_url="env://", world_size=1)
            distributed.init_distributed_mode(args)
            assert not args.distributed
    assert capsys.readouterr().out == ("this Slurm job has 2 tasks, but this process was started without srun and runs "
                                       "alone\n")


def test_tasks_of_a_slurm_step_meet(no_launcher):
    """As srun starts them, on the first of its nodes; twice, as a requeued job does. Process 1 is alone on its node."""
    script = ("import argparse\nfrom util import distributed\n"
              "args = argparse.Namespace(device='cpu', dist_url='env://', world_size=1)\n"
              "distributed.init_distributed_mode(args)\n"
              "print(args.rank, args.gpu, distributed.get_local_rank(), distributed.all_gather(args.rank))\n"
              "distributed.shutdown()\n")
    processes = [[subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={
                      **os.environ, **SLURM_STEP, "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
                      "SLURM_STEP_NODELIST": "localhost", "SLURM_RESTART_COUNT": str(restart)}) for rank in range(2)]
                 for restart in range(2)]
    lines = [[process.communicate(timeout=120)[0].splitlines()[-1] for process in run] for run in processes]
    assert lines == [["0 0 0 [0, 1]", "1 0 0 [0, 1]"]] * 2


def test_where_the_tasks_of_a_step_meet():
    environment = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-08]"}
    # 101 * 4711 + 11 * 2 = 475833
    assert distributed.slurm_rendezvous(environment) == "tcp://gpu07:25833"
    assert distributed.slurm_rendezvous({**environment, "SLURM_RESTART_COUNT": "3"}) == "tcp://gpu07:25836"
    assert distributed.slurm_rendezvous({**environment, "MASTER_ADDR": "here", "MASTER_PORT": "1234"}) == "tcp://here:1234"


@pytest.mark.parametrize("names, first", [
    ("node1", "node1"), ("b,a", "b"), ("gpu[07-09,12],cpu1", "gpu07"), ("n[3]", "n3"), ("a1,b[1-2]", "a1"),
    ("rack[1-2]n[05,07-08]", "rack1n05"), ("c-01[1-2].local,d", "c-011.local")])
def test_first_host(names, first):
    assert distributed.first_host(names) == first


@pytest.fixture
def gpus(monkeypatch, no_launcher):
    """Two made-up GPUs; yields the numbers of those that became the current one, and the process groups' options."""
    chosen, groups = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def init(backend, *, device_id=None, **options):
        groups.append((backend, device_id))

    monkeypatch.setattr(distributed.dist, "init_process_group", init)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    return chosen, groups


def join(device, **environment):
    args = argparse.Namespace(device=device, dist_url="env://", world_size=1, local_rank=None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        distributed.init_distributed_mode(args)
    return args


def test_a_named_gpu_becomes_the_current_one(gpus):
    assert [join(device).gpu for device in ("cuda:1", "cuda", "cuda:0")] == [1, 0, 0] and gpus[0] == [1, 0, 0]
    with pytest.raises(InputError, match="^--device cuda:2: this machine shows 2 GPUs, numbered from 0 on$"):
        join("cuda:2")
    join("cpu")
    assert gpus == ([1, 0, 0], [])


def test_each_process_has_its_own_gpu(gpus, monkeypatch):
    assert [join("cuda", RANK=rank + 2, WORLD_SIZE=4, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2).gpu for rank in (0, 1)] == [0, 1]
    assert gpus == ([0, 1], [("nccl", torch.device("cuda", 0)), ("nccl", torch.device("cuda", 1))])
    with pytest.raises(InputError, match="^--device cuda:0 names one GPU, but 2 processes run"):
        join("cuda:0", RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert join("cuda:1", RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1).gpu == 1
    assert join("cuda:1", RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1).gpu == 1, "one on each machine"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert join("cuda", RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, CUDA_VISIBLE_DEVICES="1").gpu == 0
    with pytest.raises(InputError, match="^process 1 needs GPU 1 but this machine has 1"):
        join("cuda", RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)


def test_older_torch_takes_no_device_for_its_process_group(gpus, monkeypatch):
    groups = []
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, init_method, world_size, rank, timeout: groups.append(rank))
    join("cuda", RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)
    assert groups == [1]


@pytest.mark.parametrize("backend, devices", [("nccl", [1]), ("gloo", None)])
def test_a_barrier_names_the_device(monkeypatch, backend, devices):
    calls = []
    monkeypatch.setattr(distributed, "is_dist_avail_and_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(distributed.dist, "barrier", lambda device_ids=None: calls.append(device_ids))
    distributed.barrier()
    assert calls == [devices]


def test_gpu_of_a_process():
    assert [distributed._gpu_of(5, local, 4, by_slurm=False) for local in range(4)] == [0, 1, 2, 3]
    assert distributed._gpu_of(1, 1, 1, by_slurm=True) == 0, "Slurm may show each task its own GPU alone"
    for visible, by_slurm in ((1, False), (2, True)):
        with pytest.raises(InputError, match=f"^process 6 needs GPU 2 but this machine has {visible}: start fewer"):
            distributed._gpu_of(6, 2, visible, by_slurm)
