"""Trainings of two processes: stopped and gone on with one, and one that another must not wait for for ever."""
import json
import os
import re
import signal
import subprocess
import time

import pytest

from commands import ROOT, SMALL_COCO, launcher_prefix, run
from datasets.toy import ToySettings, write_toy
from util.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A training of twelve images in two epochs, one image at once in each process."""
    toy = tmp_path_factory.mktemp("data") / "toy"
    write_toy(toy, ToySettings(image_size=64, num_unlabelled=1, num_train=12, num_val=1))
    return ["main.py", *SMALL_COCO, "--backbone_last_layer", "layer3", "--load_backbone", "none", "--coco_path", toy / "coco",
            *"--epochs 2 --batch_size 1 --eval_every 2 --device cpu --dropout 0 --resume auto --save_every_steps 1".split()]


def start(arguments, launcher="torchrun"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher_prefix(launcher), *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, program):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.02)


def test_a_signal_to_one_of_two_stops_both_and_one_alone_goes_on(command, tmp_path):
    """What is left of the epoch is taken by the one, each image once. The evaluation has one image: one process has none."""
    two = start([*command, "--output_dir", tmp_path])
    wait_for(tmp_path / "checkpoint.pth", two)
    main_process = int(re.match(r"process (\d+) on", (tmp_path / ".lock").read_text())[1])
    os.kill(main_process, signal.SIGUSR1)
    out, err = two.communicate(timeout=100)
    assert two.returncode and "exitcode  : 75" in err, out + err
    assert err.count("stopped by SIGUSR1 in epoch ") == 1 and "Traceback (most recent call last):\n  File" not in out

    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    step = state["so_far"]["step"]
    assert state["so_far"]["consumed"] == ([[step, 2]] if step else [])
    assert len(state["random_states"]) == 2
    begun = state["epoch"] + 1

    done = run([*command, "--output_dir", tmp_path, "--num_workers", "0"])
    steps = step + 12 - 2 * step  # of two images before, then of one each
    assert f"Epoch: [{begun}]  [{steps - 1:{len(str(steps))}d}/{steps}]" in done.stdout, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and "test_coco_eval_bbox" in lines[1]

    evaluated = run([*command[:-4], "--eval", "--resume", tmp_path / "checkpoint.pth"], "torchrun")
    tables = [[line for line in each.stdout.splitlines() if line.startswith(" Average")] for each in (done, evaluated)]
    assert tables[0] == tables[1] and len(tables[0]) == 12


HANGS = """
import sys, time, torch
from util import distributed
from util.watch import StepWatch
import argparse
args = argparse.Namespace(device="cpu", dist_url="env://", world_size=1, local_rank=None, dist_timeout=60)
distributed.init_distributed_mode(args)
watch = StepWatch(torch.device("cpu"), timeout=4)
def hang_here():
    time.sleep(100)
for step in range(5):
    watch.begin(0, step, [])
    if step == 2 and distributed.get_rank() == 1:
        if sys.argv[1] == "hangs":
            hang_here()
        raise RuntimeError("process 1 broke")
    watch.reduce({"loss": torch.zeros(())}, {"loss": 1.0}, None)
"""


@pytest.mark.parametrize("ends", ["hangs", "dies"])
def test_others_do_not_wait_for_a_process_that_is_gone(tmp_path, ends):
    script = tmp_path / "script.py"
    script.write_text(HANGS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begin = time.monotonic()
    done = subprocess.run([*launcher_prefix("torchrun"), str(script), ends], cwd=ROOT, env=environment, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode and time.monotonic() - begin < 60
    if ends == "hangs":
        assert "Timeout (0:00:04)!" in done.stderr and "in hang_here" in done.stderr
    else:
        own, others = done.stderr.index("RuntimeError: process 1 broke"), done.stderr.rindex("Traceback (most recent")
        assert own < others or done.stderr.count("Traceback (most recent") == 1
