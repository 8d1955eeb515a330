"""A Slurm of one's own for a test: munge, controller and node daemon with their own ports, files and namespace."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "unshare", "setpriv")
# Ends the daemons with the test, however it ends: when pytest dies so does unshare, with it the first process of the
# namespace, and with that every process in it.
NAMESPACE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PlugStackConfig={folder}/plugstack.conf
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
KillWait=2
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=2 RealMemory=1000
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes={host} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> Optional[str]:
    """Why a Slurm can't be brought up here, or None if it can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"no {', '.join(absent)} here (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "the test's Slurm needs root"
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=20).returncode:
        return "no process namespaces here"
    return None


def _program(name: str) -> Optional[str]:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Cluster:
    """One node with two CPUs and the partitions `low` and `high`; jobs in `high` pre-empt those in `low`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: Dict[str, str] = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of Slurm's programs."""
        done = subprocess.run(command, env=self.environment, cwd=self.folder, text=True, capture_output=True, timeout=30)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def job(self, job_id: str) -> Dict[str, str]:
        """What Slurm says of a job: JobState, Reason, Restarts, …; empty once it is forgotten."""
        words = self.run("scontrol", "-o", "show", "job", job_id, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition holds; fail with the logs if it doesn't in time."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not in {seconds} s\n{self.run('squeue', check=False)}{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """Ends of the daemons' logs."""
        return "".join(f"\n--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                       for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Bring a cluster up in an empty folder and take it down with all its jobs."""
    cluster = Cluster(folder)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "plugstack.conf").write_text("")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    ports = _free_ports(2)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(
        host=socket.gethostname().split(".")[0], folder=folder, controller_port=ports[0], node_port=ports[1]))
    daemons = "\n".join([
        f"{_program('munged')} --foreground --force --socket={folder}/munge.socket --key-file={folder}/munge.key "
        f"--pid-file={folder}/munged.pid --seed-file={folder}/munge.seed --log-file={folder}/munged.log &",
        f"for _ in $(seq 100); do [ -S {folder}/munge.socket ] && break; sleep 0.1; done",
        f"{_program('slurmctld')} -D &", f"{_program('slurmd')} -D &", "wait"])
    with open(folder / "daemons.log", "w") as log:
        namespace = subprocess.Popen([*NAMESPACE, "bash", "-c", daemons], env=cluster.environment, cwd=folder,
                                     stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        cluster.wait("the node's start", lambda: "idle" in cluster.run("sinfo", "-h", "-o", "%T", check=False), 30)
        yield cluster
    finally:
        # The first process of a namespace takes all others with it; unshare, its parent, ends when they are gone.
        first = Path(f"/proc/{namespace.pid}/task/{namespace.pid}/children").read_text().split()
        for process in map(int, first or [namespace.pid]):
            os.kill(process, signal.SIGKILL)
        namespace.wait(timeout=30)


def _free_ports(number: int) -> List[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
