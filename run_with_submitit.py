"""Submit main.py to Slurm. A job that runs out of time or is pre-empted goes back into the queue and on from its last
checkpoint."""
import argparse
import copy
import multiprocessing
import os
import shlex
import signal
from pathlib import Path
from typing import Any, Dict, Optional

import main
from util import recipes
from util.errors import InputError, Stopped, run_program
from util.ranges import TOOL_RANGES, check_ranges
from util.saving import saved_checkpoints
from util.signals import SAVE, STOP

ROOT = Path(__file__).resolve().parent
DEFAULT_CPUS = 10  # for a task with a GPU, as DETR had it
REQUEUE = signal.SIGUSR2  # submitit has Slurm send it some time before the job's end
# Slurm announces a pre-emption by SIGTERM, and may then still let the job be.
REACTIONS = {signal.SIGTERM: SAVE, signal.SIGUSR1: SAVE, REQUEUE: STOP}


def get_args_parser() -> argparse.ArgumentParser:
    """All flags of main.py, and those of the cluster."""
    parser = argparse.ArgumentParser("Submit main.py to Slurm", parents=[main.get_args_parser()], allow_abbrev=False)
    group = parser.add_argument_group("cluster")
    group.add_argument("--ngpus", default=8, type=int, help="GPUs on each node, a process for each; 0 for CPUs")
    group.add_argument("--nodes", default=2, type=int)
    group.add_argument("--tasks_per_node", type=int, help="processes on each node; with GPUs always one for each (1)")
    group.add_argument("--timeout", default=60, type=int,
                       help="minutes after which the job is requeued")
    group.add_argument("--max_timeouts", default=100, type=int,
                       help="how many times a job that ran out of time is requeued; pre-emptions don't count")
    group.add_argument("--job_dir", default="", help="shared folder for the job's files, %%j standing for its number "
                       "(slurm/%%j in --output_dir); without --output_dir also for what main.py writes")
    group.add_argument("--job_name", default="detr")
    group.add_argument("--partition")
    group.add_argument("--account")
    group.add_argument("--constraint", help="kinds of nodes, such as volta32gb")
    group.add_argument("--comment")
    group.add_argument("--mem_gb", type=int, help="memory of each node (what the cluster gives)")
    group.add_argument("--cpus_per_task", type=int, help=f"CPUs of each process ({DEFAULT_CPUS} with GPUs, else 1)")
    group.add_argument("--sbatch", nargs="+", default=[], metavar="NAME=VALUE", help="other options of sbatch: qos=high")
    return parser


class Run:
    """What each task of a job does. submitit stores it at submission, and again (`checkpoint`) before it requeues the
    job.

    The last checkpoint is looked for at every start, so that a job finds it which Slurm itself requeues, unwarned.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __call__(self) -> None:
        _shield_children()
        job = os.environ["SLURM_JOB_ID"]
        args = copy.deepcopy(self.args)  # main fills in what belongs to this machine
        args.output_dir = args.output_dir.replace("%j", job)
        if not args.eval and (not args.resume or saved_checkpoints(args.output_dir)):
            args.resume = "auto"
        run_program(lambda: self._run(args))

    def _run(self, args: argparse.Namespace) -> None:
        """Train; at the signal that announces the end of the job's time save first, and then let submitit requeue it."""
        requeue = signal.getsignal(REQUEUE)
        try:
            main.main(args, reactions=REACTIONS)
        except Stopped as stop:
            print(str(stop) or "stopped", flush=True)
            requeue(REQUEUE, None)  # ends the first process; the others end in good order, not to be taken for failures

    def checkpoint(self) -> Any:
        """What the requeued job does: the same. Called in the first process while it is interrupted anywhere."""
        from submitit.helpers import DelayedSubmission
        return DelayedSubmission(self)


def _shield_children() -> None:
    """Keep the signals that announce a requeue from loading processes; Slurm sends them to all processes of a job.

    A loading process that has inherited its task's handler would requeue the job once more, and one that a SIGTERM ends
    would end the training before its time. Blocked signals stay so whatever handlers torch sets in its loading processes.
    """
    multiprocessing.set_start_method("fork", force=True)  # the mask is set in what is forked
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK,
                                                                      {signal.SIGUSR2, signal.SIGTERM}))


def split_args(args: argparse.Namespace) -> argparse.Namespace:
    """main.py's part of the flags, with the device and the output directory that the cluster's part decides.

    Raises:
        InputError: if flags contradict each other, so that a mistake is told before the job has waited in the queue.
    """
    check_ranges(args, TOOL_RANGES)
    if args.ngpus and args.tasks_per_node not in (None, args.ngpus):
        raise InputError(f"--tasks_per_node {args.tasks_per_node} contradicts --ngpus {args.ngpus}: there is a process "
                         "for each GPU; the flag is for training on CPUs (--ngpus 0)")
    if args.device and (args.ngpus > 0) != args.device.startswith("cuda"):
        raise InputError(f"--device {args.device} contradicts --ngpus {args.ngpus}; --ngpus 0 trains on CPUs")
    if args.device and args.device.startswith("cuda:") and args.ngpus * args.nodes > 1:
        raise InputError(f"--device {args.device} names one GPU, but the job has {args.ngpus * args.nodes} processes, each on a "
                         "GPU of its own: pass --device cuda")
    if not (args.output_dir or args.job_dir):
        raise InputError("--output_dir is missing: which folder, seen by all nodes, is for checkpoints and the job's files?")
    names = vars(main.get_args_parser().parse_args([]))
    run = argparse.Namespace(**{name: getattr(args, name) for name in names})
    run.device = args.device or ("cuda" if args.ngpus else "cpu")
    run.output_dir = os.path.abspath(args.output_dir or args.job_dir)
    checked = copy.deepcopy(run)
    checked.device = "cpu"  # the machine one submits from may lack GPUs
    recipes.resolve(checked)
    recipes.require_data(checked)
    _refuse_used_folder(run)
    return run


def _refuse_used_folder(run: argparse.Namespace) -> None:
    """A checkpoint in the folder must be one to continue: after a requeue nothing else tells it from the job's own."""
    found = saved_checkpoints(run.output_dir)
    if found and not run.eval and run.resume != "auto" and os.path.abspath(run.resume) not in found:
        raise InputError(f"{found[0]} is of an earlier run: pass --resume auto to continue it, or another --output_dir")


def job_options(args: argparse.Namespace) -> Dict[str, Any]:
    """What submitit's Slurm executor is told, from the flags of the cluster.

    Raises:
        InputError: if an entry of --sbatch isn't NAME=VALUE or NAME.
    """
    extra: Dict[str, Any] = {"requeue": True}
    for entry in args.sbatch:
        name, _, value = entry.lstrip("-").partition("=")
        if not name:
            raise InputError(f"--sbatch {entry} is not NAME=VALUE")
        extra[name] = value or True
    options = {
        "job_name": args.job_name, "nodes": args.nodes, "ntasks_per_node": _processes_per_node(args),
        "gpus_per_node": args.ngpus or None, "cpus_per_task": args.cpus_per_task or (DEFAULT_CPUS if args.ngpus else 1),
        "mem": args.mem_gb and f"{args.mem_gb}GB", "time": args.timeout, "partition": args.partition,
        "account": args.account, "constraint": args.constraint, "comment": args.comment, "additional_parameters": extra,
        # From whatever folder the job is submitted, its tasks import this code; relative paths mean that folder.
        "setup": [f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"'],
        "srun_args": ["--kill-on-bad-exit=1"],  # a process that fails must not leave the others waiting for it
    }
    return {name: value for name, value in options.items() if value is not None}


def _processes_per_node(args: argparse.Namespace) -> int:
    return args.ngpus or args.tasks_per_node or 1


def submit(args: argparse.Namespace) -> None:
    """Send the job to Slurm and say where to watch it."""
    run = split_args(args)
    folder = os.path.abspath(args.job_dir or os.path.join(run.output_dir, "slurm", "%j"))
    submitit = _submitit()
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=args.max_timeouts)
        executor.update_parameters(**job_options(args))
        job = executor.submit(Run(run))
    except (RuntimeError, OSError) as error:  # submitit's own errors are RuntimeErrors
        raise InputError(f"the job was not submitted: {_reason(error)}") from error
    print(f"submitted job {job.job_id}: {args.nodes} nodes with {_processes_per_node(args)} processes each, "
          f"requeued after {args.timeout} minutes\n"
          f"output: {run.output_dir.replace('%j', job.job_id)}\nlog: {job.paths.stdout}")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise InputError(f"run_with_submitit.py needs submitit, which can't be imported ({error}): "
                         "pip install -r requirements/cluster.txt") from error
    return submitit


def _reason(error: Exception) -> Optional[str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line]
    return (told or lines or [type(error).__name__])[-1]


if __name__ == "__main__":
    run_program(lambda: submit(get_args_parser().parse_args()))
