"""Trainings of two processes: stopped and gone on with one, and one that another must not wait for for ever."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

import main
from commands import ROOT, SMALL_COCO, launcher_prefix, run
from datasets.toy import ToySettings, write_toy
from util.checkpoint import load_checkpoint
from util.errors import Stopped


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A training of twelve images in two epochs, one image at once in each process."""
    toy = tmp_path_factory.mktemp("data") / "toy"
    write_toy(toy, ToySettings(image_size=64, num_unlabelled=1, num_train=12, num_val=1))
    return ["main.py", *SMALL_COCO, "--backbone_last_layer", "layer3", "--load_backbone", "none", "--coco_path", toy / "coco",
            *"--epochs 2 --batch_size 1 --eval_every 2 --device cpu --resume auto --save_every_steps 1 --num_workers 1".split()]


def start(arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher_prefix("torchrun"), *map(str, arguments)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, program):
    deadline = time.monotonic() + 100
    while not path.exists():
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.02)


def here(arguments, last_step=None):
    """The same in this process."""
    main.main(main.get_args_parser().parse_args([str(word) for word in arguments[1:]]), last_step=last_step)


def test_two_processes_stop_together_one_goes_on_and_two_end_it(command, tmp_path, capsys):
    """Each image once in an epoch, whoever takes it. At the evaluation, of one image, one of the two has none."""
    command = [*command, "--output_dir", tmp_path]
    two = start(command)
    wait_for(tmp_path / "checkpoint.pth", two)
    main_process = int(re.match(r"process (\d+) on", (tmp_path / ".lock").read_text())[1])
    os.kill(main_process, signal.SIGUSR1)
    out, err = two.communicate(timeout=100)
    assert two.returncode and "exitcode  : 75" in err and err.count("stopped by SIGUSR1 in epoch ") == 1, out + err

    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    epoch, first = state["epoch"] + 1, state["so_far"]["step"]
    assert state["so_far"]["consumed"] == ([[first, 2]] if first else []) and len(state["random_states"]) == 2
    if first > 4:  # then too little is left of the epoch for the one to stop in it
        epoch, first = epoch + 1, 0
    with pytest.raises(Stopped):
        here(command, last_step=(epoch, first + 1))
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert state["so_far"]["consumed"] == [[first, 2]] * bool(first) + [[2, 1]]

    capsys.readouterr()
    done = run([*command, "--eval_every", "1"], "pair")
    steps = first + 2 + (12 - 2 * first - 2) // 2
    assert f"Epoch: [{epoch}]  [{steps - 1:{len(str(steps))}d}/{steps}]" in done.stdout, done.stdout
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and "test_coco_eval_bbox" in lines[1]
    here([*command[:-8], "--eval", "--resume", tmp_path / "checkpoint.pth"])
    tables = [[line for line in said.splitlines() if line.startswith(" Average")][-12:]
              for said in (done.stdout, capsys.readouterr().out)]
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
    watch.reduce({}, torch.zeros(()), None)
"""


@pytest.mark.parametrize("ends", ["hangs", "dies"])
def test_others_do_not_wait_for_a_process_that_is_gone(tmp_path, ends):
    """Without a launcher, which would end them, too."""
    script = tmp_path / "script.py"
    script.write_text(HANGS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [subprocess.Popen([sys.executable, str(script), ends], cwd=ROOT, text=True, stderr=subprocess.PIPE, env={
                **os.environ, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": str(rank)})
            for rank in range(2)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    if ends == "hangs":
        assert "Timeout (0:00:04)!" in said[1] and "in hang_here" in said[1]
    else:
        assert "RuntimeError: process 1 broke" in said[1]


STOPS = """
import argparse, time
from util.distributed import get_rank, init_distributed_mode
from util.errors import Stopped, run_program
def stop():
    init_distributed_mode(argparse.Namespace(device="cpu", dist_url="env://", world_size=1, local_rank=None, dist_timeout=60))
    time.sleep(3 * (get_rank() == 0))
    raise Stopped("stopped in good order" if get_rank() == 0 else "")
run_program(stop)
"""


def test_a_process_that_stops_lets_a_slower_one_speak(tmp_path):
    """Torchrun ends all processes once one has left."""
    script = tmp_path / "script.py"
    script.write_text(STOPS)
    done = subprocess.run([*launcher_prefix("torchrun"), str(script)], cwd=ROOT, text=True, capture_output=True, timeout=100,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode and "exitcode  : 75" in done.stderr and "stopped in good order\n" in done.stderr, done.stderr
