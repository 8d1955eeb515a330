"""Whatever ends a training, it goes on as if nothing had happened."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import main
from commands import ROOT, SMALL_COCO, SMALL_PRETRAIN
from datasets.toy import ToySettings, write_toy
from tools import replay
from util.checkpoint import load_checkpoint
from util.errors import InputError, Stopped


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=64, num_unlabelled=13, num_train=12, num_val=2))
    return folder


@pytest.fixture(scope="module")
def flags(toy):
    """By stage, those of a training of two epochs with six steps in each."""
    common = ("--backbone_last_layer layer3 --load_backbone none --epochs 2 --lr_drop 1 --device cpu "
              "--num_workers 0").split()
    return {"train": [*SMALL_COCO, "--coco_path", toy / "coco", "--eval_every", "2", *common],
            "pretrain": [*SMALL_PRETRAIN, "--batch_size", "2", "--imagenet_path", toy / "unlabelled", "--feature_recon",
                         "--num_queries", "20", "--query_shuffle", *common]}


def train(flags, out, *more, last_step=None):
    """A training in this process: the command line's, without starting a program."""
    args = main.get_args_parser().parse_args([str(flag) for flag in (*flags, "--output_dir", out, *more)])
    main.main(args, last_step=last_step)


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """Folders of trainings that nothing disturbs, by stage and accumulated batches."""
    done = {}

    def folder(stage, accumulate="1"):
        if (stage, accumulate) not in done:
            done[stage, accumulate] = tmp_path_factory.mktemp("straight")
            train(flags[stage], done[stage, accumulate], "--accumulate_steps", accumulate)
        return done[stage, accumulate]

    return folder


def weights(folder):
    return load_checkpoint(str(folder / "checkpoint.pth"))["model"]


def assert_same_end(folder, other):
    """The same weights and the same lines of log.txt, bit for bit."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (folder / "log.txt").read_text() == (other / "log.txt").read_text()


@pytest.mark.parametrize("stage, accumulate", [("pretrain", "1"), ("train", "1"), ("train", "2")])
def test_a_run_that_breaks_off_in_mid_epoch_goes_on_exactly(flags, straight, tmp_path, stage, accumulate):
    """Twice in one epoch, once in the other; with loading processes and without."""
    run = [*flags[stage], "--accumulate_steps", accumulate, "--save_every_steps", "2", "--resume", "auto"]
    for last_step, workers in (((0, 2), 0), ((0, 4), 1), ((1, 3), 0)):
        with pytest.raises(Stopped):
            train(run, tmp_path, "--num_workers", workers, last_step=last_step)
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert (state["epoch"], state["so_far"]["step"], state["so_far"]["consumed"]) == (0, 4, [[4, 2]])
    train(run, tmp_path)
    assert_same_end(tmp_path, straight(stage, accumulate))


def when_exists(path, action):
    """Do something as soon as a file is there."""
    def wait():
        while not path.exists():
            time.sleep(0.01)
        action()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_at_the_next_step(flags, straight, tmp_path, number):
    handler = signal.getsignal(number)
    when_exists(tmp_path / "checkpoint.pth", lambda: os.kill(os.getpid(), number))
    run = [*flags["train"], "--save_every_steps", "1"]
    with pytest.raises(Stopped, match=rf"^stopped by {number.name} in epoch [01]( after step \d)?: "
                                      rf"saved {tmp_path}/checkpoint.pth, --resume auto goes on$"):
        train(run, tmp_path)
    assert signal.getsignal(number) is handler
    if number == signal.SIGTERM:
        train(run, tmp_path, "--resume", "auto")
        assert_same_end(tmp_path, straight("train"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step(flags, tmp_path, monkeypatch, number):
    build = main.build_model

    def interrupted(*args):
        signal.raise_signal(number)
        return build(*args)

    monkeypatch.setattr(main, "build_model", interrupted)
    handler = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"^stopped by {number.name} before the first step: nothing new was trained, "
                                      "--resume auto goes on$"):
        train(flags["train"], tmp_path)
    assert signal.getsignal(number) is handler and not list(tmp_path.glob("*.pth"))


def test_a_signal_while_the_program_is_imported():
    script = ("import signal\nfrom util import early_signals\nearly_signals.hold()\nsignal.raise_signal(signal.SIGTERM)\n"
              "from util.signals import SignalListener\nwith SignalListener() as listener:\n    print(listener.heard)")
    assert subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True) == "SIGTERM\n"


def test_a_signal_during_evaluation(flags, straight, tmp_path, monkeypatch):
    """The evaluation is broken off and done again, the epoch's steps are not."""
    evaluate = main.evaluate

    def warned(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(main, "evaluate", warned)
    with pytest.raises(Stopped, match="^stopped by SIGTERM in epoch 1 after step 5: saved"):
        train(flags["train"], tmp_path)
    monkeypatch.setattr(main, "evaluate", evaluate)
    train(flags["train"], tmp_path, "--resume", "auto")
    assert_same_end(tmp_path, straight("train"))


@pytest.mark.parametrize("newest", ["cut off", "changed"])
def test_a_damaged_checkpoint_is_passed_over(flags, straight, tmp_path, capsys, newest):
    run = [*flags["train"], "--save_every_steps", "2", "--resume", "auto"]
    with pytest.raises(Stopped):
        train(run, tmp_path, last_step=(0, 4))
    path = tmp_path / "checkpoint.pth"
    content = bytearray(path.read_bytes())
    if newest == "cut off":
        del content[-1000:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    train(run, tmp_path)
    said = capsys.readouterr().out
    assert f"resume: {path} is damaged, it is now called checkpoint.pth.damaged\n" in said
    assert f"resume: {tmp_path}/checkpoint_previous.pth, continuing with epoch 0 after step 1\n" in said
    assert_same_end(tmp_path, straight("train"))


def test_another_seed_cannot_continue_an_epoch(flags, tmp_path):
    with pytest.raises(Stopped):
        train(flags["train"], tmp_path, "--save_every_steps", "1", last_step=(0, 1))
    with pytest.raises(InputError, match=f"^--resume {tmp_path}/checkpoint.pth is of mid-epoch: to go on there"):
        train(flags["train"], tmp_path, "--resume", "auto", "--seed", "3")


def test_an_image_that_vanishes_between_two_starts_spoils_nothing(flags, toy, tmp_path, capsys):
    images = shutil.copytree(toy / "unlabelled", tmp_path / "images")
    run = [*flags["pretrain"], "--imagenet_path", images, "--save_every_steps", "1", "--resume", "auto"]
    with pytest.raises(Stopped):
        train(run, tmp_path / "out", last_step=(0, 1))
    next(images.rglob("*.jpg")).unlink()
    train(run, tmp_path / "out")
    assert "the training images are no longer those of the checkpoint (13 then, 12 now)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and lines[1]["unreadable_images"] == 0


def test_an_image_that_is_renamed_between_two_starts_is_noticed(flags, toy, tmp_path, capsys):
    images = shutil.copytree(toy / "unlabelled", tmp_path / "images")
    run = [*flags["pretrain"], "--imagenet_path", images, "--save_every_steps", "1", "--resume", "auto"]
    with pytest.raises(Stopped):
        train(run, tmp_path / "out", last_step=(0, 1))
    min(images.rglob("*.jpg")).rename(images / "zz.jpg")
    with pytest.raises(Stopped):
        train(run, tmp_path / "out", last_step=(0, 2))
    assert "no longer those of the checkpoint (13 then as now, but with other names, ids or sizes)" in capsys.readouterr().out


def test_a_folder_in_use_is_refused(flags, tmp_path):
    script = ("import sys, time\nfrom util.saving import claimed\n"
              "with claimed(sys.argv[1]):\n    print('in', flush=True)\n    time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=rf"^--output_dir {tmp_path} is in use by another training \(process {other.pid} "
                                             r"on .*\); wait for its end or choose another folder$"):
            train(flags["train"], tmp_path)
        (tmp_path / "checkpoint.pth.17.tmp").write_bytes(b"half")
        other.kill()
        other.wait()
        with pytest.raises(Stopped):
            train(flags["train"], tmp_path, last_step=(0, 0))
        assert not list(tmp_path.glob("*.tmp")), "swept"
    finally:
        other.kill()
        other.communicate()


# Numbers that go wrong.


def failure(flags, out, *more):
    """The message of a training that fails, and the file that it leaves."""
    with pytest.raises(FloatingPointError) as caught:
        train(flags, out, *more)
    message, _, hint = str(caught.value).partition("; ")
    path, = out.glob("failure_*.pth")
    assert hint == f"python -m tools.replay {path} makes it happen again"
    return message, path


def replayed(path):
    with pytest.raises(FloatingPointError) as caught:
        replay.replay(replay.get_args_parser().parse_args([str(path)]))
    return str(caught.value)


def test_a_rate_beyond_all_bounds_is_found_and_can_be_replayed(flags, tmp_path, capsys):
    """From the start, as there is no checkpoint before."""
    message, path = failure(flags["train"], tmp_path, "--lr", "1e30")
    assert "(epoch 0, step " in message and "image ids" in message
    assert not (tmp_path / "checkpoint.pth").exists()
    bundle = load_checkpoint(str(path))
    assert len(bundle["image_ids"]) == len(bundle["targets"]) == 2 and bundle["message"] == message
    assert replayed(path) == message
    assert "the same failure again" in capsys.readouterr().out


@pytest.mark.parametrize("spoil, words", [
    ("forward", "the model predicts NaN or infinite classes or boxes for image id"),
    ("loss", "the loss became infinite or NaN: loss_bbox"),
    ("gradient", "the gradient became infinite or NaN, that of finite losses (epoch 1, step 2, image ids")])
def test_what_goes_wrong_in_mid_epoch_is_named_and_can_be_replayed(flags, tmp_path, monkeypatch, spoil, words):
    """At the third step of the second epoch; the checkpoint that is due after that step is not written."""
    run = [*flags["train"], "--save_every_steps", "3"]
    real = main.build_model

    def build(args, things):
        model, criterion, post = real(args, things)
        steps = [0]

        def forward(module, inputs, outputs):
            steps[0] += module.training
            if load_step(args) + steps[0] == 9:
                if spoil == "forward":
                    outputs["pred_logits"] = outputs["pred_logits"] * float("nan")
                elif spoil == "gradient":
                    outputs["pred_boxes"].register_hook(lambda gradient: gradient * float("inf"))
            return outputs

        def losses(module, inputs, found):
            if spoil == "loss" and module.training and load_step(args) + steps[0] == 9:
                found["loss_bbox"] = found["loss_bbox"] * float("inf")
            return found

        model.register_forward_hook(forward)
        criterion.register_forward_hook(losses)
        return model, criterion, post

    def load_step(args):
        return 6 if args.resume else 0  # the replay goes on after the first epoch

    monkeypatch.setattr(main, "build_model", build)
    message, path = failure(run, tmp_path)
    assert message.startswith(words.split(" (")[0]) and "(epoch 1, step 2, image ids" in message
    state = load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert (state["epoch"], state["so_far"]["step"]) == (0, 0)
    assert replayed(path) == message
    state["epoch"] = 5
    torch.save(state, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match="checkpoint.pth was overwritten after the failure"):
        replay.replay(replay.get_args_parser().parse_args([str(path)]))
