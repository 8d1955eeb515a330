"""run_with_submitit.py on a real Slurm, with a job that is told to go, one that is thrown out, and both going on."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import slurm_cluster
from commands import ROOT, SMALL_COCO, run
from datasets.toy import ToySettings, write_toy

EPOCHS = 20
pytest.importorskip("submitit", reason="no submitit here (pip install -r requirements/cluster.txt)")
WHY_NOT = slurm_cluster.missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no Slurm to be had: {WHY_NOT}")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=1, num_train=8, num_val=2))
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def training(toy):
    return [*SMALL_COCO, "--coco_path", str(toy / "coco"), "--load_backbone", "none", "--epochs", str(EPOCHS),
            "--lr_drop", "8", "--eval_every", "5", "--seed", "5"]


def read(path):
    return path.read_text() if path.exists() else ""


def submit(cluster, folder, *flags, check=True):
    """Run run_with_submitit.py in a folder; returns what it did and the number of the job."""
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(ROOT / "run_with_submitit.py"), "--ngpus", "0", "--nodes", "1", *flags],
                          cwd=folder, env=environment, text=True, capture_output=True, timeout=60)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done, done.stdout.split(":")[0].rpartition(" ")[2]


def test_a_job_that_is_interrupted_twice_ends_as_if_it_had_not_been(cluster, toy, tmp_path):
    """First by the signals that Slurm sends before it pre-empts a job or takes it off for its time, to every process of
    the job, loading processes included; then by a job of a partition that pre-empts without any warning."""
    done, job = submit(cluster, tmp_path, "--tasks_per_node", "2", "--timeout", "9", "--partition", "low", "--comment",
                       "two words", "--sbatch", "nice=1", "--output_dir", "out", "--tensorboard", *training(toy))
    out, log = tmp_path / "out", tmp_path / "out" / "slurm" / job / f"{job}_0_log.out"
    assert f"output: {out}\nlog: {log}\n" in done.stdout
    said = cluster.job(job)
    assert (said["NumTasks"], said["Nice"], said["Requeue"]) == ("2", "1", "1")

    def epochs():
        return [json.loads(line)["epoch"] for line in read(out / "log.txt").splitlines()]

    def trained(epoch):
        return lambda: state("RUNNING") and max(epochs(), default=-1) >= epoch

    def state(*wanted):
        now = cluster.job(job)["JobState"]
        possible = now in wanted or now not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert possible, now + read(log) + read(log.with_suffix(".err"))
        return now in wanted

    cluster.wait("an epoch", trained(0), 90)
    for name in ("CONT", "TERM"):
        cluster.run("scancel", "--signal", name, job)
    warned = max(epochs())
    cluster.wait("epochs after the warning", trained(warned + 2), 60)  # so a loading process of the next has come up too
    cluster.run("scancel", "--signal", "USR2", job)
    cluster.wait("the first requeue", lambda: cluster.job(job).get("Restarts") == "1", 30)
    cluster.wait("the second start", lambda: state("RUNNING") and read(log).count("continuing with epoch") == 1, 90)
    cluster.run("sbatch", "--partition", "high", "--exclusive", "--output", "/dev/null", "--wrap", "true")
    cluster.wait("the second requeue", lambda: cluster.job(job).get("Restarts") == "2", 30)
    cluster.wait("the end", lambda: state("COMPLETED"), 120)

    assert cluster.job(job)["Restarts"] == "2"
    assert epochs() == list(range(EPOCHS))
    text = read(log)
    assert text.count("distributed: 2 processes, gloo, tcp://") == 3
    # A job that is thrown out while it saves goes on from the file that was whole by then, which may be another than the last.
    started = re.findall(r"^resume: .*", text, re.MULTILINE)
    again = re.compile(rf"resume: {re.escape(str(out))}/checkpoint\w*\.pth, continuing with epoch ")
    assert [bool(again.match(line)) for line in started] == [False, True, True], started
    assert text.count("Calling checkpoint method") == 1, "the first process requeues the job, none of its children does"
    assert text.count("Training time") == 1

    run(["main.py", *training(toy), "--device", "cpu", "--output_dir", tmp_path / "straight"], "pair")
    weights = [torch.load(folder / "checkpoint.pth", weights_only=True)["model"] for folder in (out, tmp_path / "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert read(out / "log.txt").splitlines()[-1] == read(tmp_path / "straight" / "log.txt").splitlines()[-1]


def test_what_slurm_refuses_is_told_in_one_sentence(cluster, toy, tmp_path):
    done, _ = submit(cluster, tmp_path, "--partition", "nowhere", "--output_dir", "out", *training(toy), check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: the job was not submitted: ")
    assert "Invalid partition name specified" in done.stderr.splitlines()[-1]


def test_an_error_in_the_job_ends_it(cluster, toy, tmp_path):
    """It isn't requeued, the other task doesn't wait for the one that failed, and `%j` stands for the job's number."""
    (tmp_path / "spoilt.pth").write_bytes(b"no checkpoint")
    _, job = submit(cluster, tmp_path, "--tasks_per_node", "2", "--job_dir", str(tmp_path / "jobs" / "%j"), *training(toy),
                    "--pretrain", str(tmp_path / "spoilt.pth"))
    cluster.wait("the end", lambda: cluster.job(job)["JobState"] == "FAILED", 60)
    # Of two tasks Slurm gives the higher status: 2 if both end by themselves, 143 if the second is ended by a SIGTERM first.
    assert cluster.job(job)["Restarts"] == "0" and cluster.job(job)["ExitCode"] in ("2:0", "143:0")
    errors = (tmp_path / "jobs" / job / f"{job}_0_log.err").read_text()
    assert "error: --pretrain" in errors and "not a checkpoint, or damaged" in errors


def test_the_cluster_leaves_nothing_behind(tmp_path):
    """Also when a job is running and its process has left the session of its parents."""
    with slurm_cluster.slurm_cluster(tmp_path) as short:
        job = short.run("sbatch", "--output", "/dev/null", "--wrap", f"setsid -w sleep 1000 # {tmp_path}").split()[-1]
        short.wait("the job's start", lambda: short.job(job)["JobState"] == "RUNNING" and _processes(tmp_path), 30)
    assert not _processes(tmp_path)


def _processes(folder):
    """Processes that belong to a cluster: its configuration is in their environment."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                if f"SLURM_CONF={folder}/".encode() in file.read():
                    found.append(process)
        except OSError:
            continue  # it has ended meanwhile
    return found
