"""tools/run_dist_launch.sh and tools/run_dist_slurm.sh: trainings by them, and what they say to wrong use."""
import os
import shutil
import subprocess
import sys

import pytest
import torch

import slurm_cluster
from commands import ROOT, SMALL_COCO, free_port, run, weights, write_data_root

LAUNCH, SLURM = "./tools/run_dist_launch.sh", "./tools/run_dist_slurm.sh"
CONFIG = "./configs/r50_deformable_detr.sh"
SMALL = [*SMALL_COCO, *"--load_backbone none --epochs 1 --num_queries 20 --num_workers 0 --device cpu".split()]
OWN = ("GPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "CPUS_PER_TASK", "SRUN_ARGS")


def start(*words, **environment):
    """Start a launcher; what the environment of the tests says to launchers doesn't reach it."""
    inherited = {name: value for name, value in os.environ.items() if name not in OWN}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable,
                   **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen(list(map(str, words)), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment)


def finish(launched):
    out, err = launched.communicate(timeout=120)
    assert launched.returncode == 0, out[-3000:] + err[-3000:]
    return out


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_data_root(tmp_path_factory.mktemp("data"), image_size=64, num_unlabelled=1, num_train=8, num_val=2)


@pytest.fixture(scope="module")
def by_torchrun(data_root, tmp_path_factory):
    """The weights that two processes of torchrun end with."""
    out = tmp_path_factory.mktemp("torchrun")
    run(["main.py", "--model", "deformable_detr", "--coco_path", data_root / "MSCoco", *SMALL, "--output_dir", out],
        "torchrun")
    return weights(out)


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_launch_trains_as_torchrun_does(data_root, by_torchrun, tmp_path):
    """GPUS_PER_NODE may be more than the processes; words with spaces stay whole; what is appended wins."""
    out = tmp_path / "two words"
    printed = finish(start(LAUNCH, 2, CONFIG, *SMALL, "--output_dir", out, GPUS_PER_NODE=8, DATA_ROOT=data_root))
    assert "distributed: 2 processes, gloo" in printed
    assert_equal(weights(out), by_torchrun)


def test_two_launchers_make_one_training(data_root, by_torchrun, tmp_path):
    port = free_port()
    nodes = [start(LAUNCH, 2, CONFIG, *SMALL, "--output_dir", tmp_path, GPUS_PER_NODE=1, NODE_RANK=rank,
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DATA_ROOT=data_root) for rank in range(2)]
    try:
        printed = [finish(node) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert "distributed: 2 processes, gloo" in "".join(printed)
    assert_equal(weights(tmp_path), by_torchrun)


def test_a_failing_script_fails_the_launcher():
    launched = start(LAUNCH, 2, "false")
    assert launched.wait(timeout=120) != 0 and "false FAILED" in launched.communicate()[1]


PRINT = {"PYTHON": "./tests/e2e/print_words.sh"}
TORCHRUN = "-m torch.distributed.run"


@pytest.mark.parametrize("processes, environment, expected", [
    (4, {}, "--standalone --nproc_per_node=4"),
    (8, {"GPUS_PER_NODE": 8}, "--standalone --nproc_per_node=8"),
    (16, {"NNODES": 1}, "--standalone --nproc_per_node=16"),
    (4, {"MASTER_PORT": 5000},
     "--nnodes=1 --node_rank=0 --master_addr=127.0.0.1 --master_port=5000 --nproc_per_node=4"),
    (16, {"NODE_RANK": 1, "MASTER_ADDR": "gpu1"},
     "--nnodes=2 --node_rank=1 --master_addr=gpu1 --master_port=29500 --nproc_per_node=8"),
    (6, {"GPUS_PER_NODE": 4, "NNODES": 3, "NODE_RANK": 2, "MASTER_ADDR": "gpu1", "MASTER_PORT": 1},
     "--nnodes=3 --node_rank=2 --master_addr=gpu1 --master_port=1 --nproc_per_node=2")])
def test_how_processes_are_placed(processes, environment, expected):
    printed = finish(start(LAUNCH, processes, CONFIG, "--lr", "1e-4", **PRINT, **environment))
    assert printed == f"{TORCHRUN} {expected} --no-python {CONFIG} --lr 1e-4 "


USAGE = "usage: [GPUS_PER_NODE=8] ./tools/run_dist_"


@pytest.mark.parametrize("words, environment, message", [
    ((LAUNCH,), {}, USAGE + "launch.sh PROCESSES SCRIPT [FLAG ...]"),
    ((LAUNCH, 8), {}, USAGE + "launch.sh PROCESSES SCRIPT [FLAG ...]"),
    ((SLURM, "gpu", "detr", 8), {}, USAGE + "slurm.sh PARTITION JOB_NAME PROCESSES SCRIPT [FLAG ...]"),
    ((LAUNCH, CONFIG, 8), {}, f"PROCESSES {CONFIG} is not a whole number from 1 on"),
    ((LAUNCH, 0, CONFIG), {}, "PROCESSES 0 is not a whole number from 1 on"),
    ((SLURM, "gpu", "detr", CONFIG, 8), {}, f"PROCESSES {CONFIG} is not a whole number from 1 on"),
    ((LAUNCH, 8, CONFIG), {"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE all is not a whole number from 1 on"),
    ((LAUNCH, 8, CONFIG), {"NNODES": 0}, "NNODES 0 is not a whole number from 1 on"),
    ((SLURM, "gpu", "detr", 8, CONFIG), {"CPUS_PER_TASK": 0}, "CPUS_PER_TASK 0 is not a whole number from 1 on"),
    ((LAUNCH, 9, CONFIG), {}, "9 processes can't be shared out evenly among 2 nodes"),
    ((LAUNCH, 8, CONFIG), {"NNODES": 2, "GPUS_PER_NODE": 3},
     "8 processes with NNODES 2 are 4 on each, more than GPUS_PER_NODE 3"),
    ((LAUNCH, 16, CONFIG), {}, "2 nodes: set NODE_RANK on each of them, to 0 on the first and up to 1"),
    ((LAUNCH, 16, CONFIG), {"NODE_RANK": 2}, "2 nodes: set NODE_RANK on each of them, to 0 on the first and up to 1"),
    ((LAUNCH, 16, CONFIG), {"NODE_RANK": 0}, "2 nodes: set MASTER_ADDR on each of them to the address of the first"),
    ((LAUNCH, 8, "configs/none.sh"), {}, "configs/none.sh: no such script"),
    ((SLURM, "gpu", "detr", 8, "main.py"), {},
     "main.py can't be run: it must be executable (chmod +x) and be given with its folder (./main.py)")])
def test_wrong_use_is_told_in_one_sentence(words, environment, message):
    assert refused(*words, **environment) == f"error: {message}\n"


def refused(*words, **environment):
    launched = start(*words, **environment)
    out, err = launched.communicate(timeout=20)
    assert (launched.returncode, out) == (2, "")
    return err


def test_a_machine_without_slurm(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    message = "error: there is no srun here: start it on a machine of a Slurm cluster\n"
    assert refused(SLURM, "gpu", "detr", 8, CONFIG, PATH=tmp_path) == message


def test_what_slurm_is_asked_for(tmp_path):
    (tmp_path / "srun").symlink_to(ROOT / "tests" / "e2e" / "print_words.sh")
    printed = finish(start(SLURM, "gpu", "detr", 16, CONFIG, "--lr", "1e-4", GPUS_PER_NODE=8, CPUS_PER_TASK=6,
                           SRUN_ARGS="--time=60 --gres=none", PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert printed == ("--partition=gpu --job-name=detr --nodes=2 --ntasks=16 --ntasks-per-node=8 --gres=gpu:8 "
                       f"--cpus-per-task=6 --kill-on-bad-exit=1 --time=60 --gres=none {CONFIG} --lr 1e-4 ")


@pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"no Slurm to be had: {slurm_cluster.missing()}")
def test_slurm_trains_as_torchrun_does(data_root, by_torchrun, tmp_path_factory, tmp_path):
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "DATA_ROOT": data_root, "CPUS_PER_TASK": 1}
        launched = start(SLURM, "low", "detr", 2, CONFIG, *SMALL, "--output_dir", tmp_path, GPUS_PER_NODE=2,
                         SRUN_ARGS="--gres=none", **environment)
        assert "distributed: 2 processes, gloo, tcp://" in finish(launched)
        assert_equal(weights(tmp_path), by_torchrun)
        launched = start(SLURM, "low", "detr", 2, CONFIG, **environment)  # asks for GPUs, of which there are none
        assert launched.wait(timeout=20) and "Invalid generic resource (gres)" in launched.communicate()[1]
