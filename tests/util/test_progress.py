"""The estimate of a training's time, and what TensorBoard reads back."""
import argparse
import sys

import pytest

from util import progress
from util.errors import InputError
from util.metric_logger import MetricLogger, SmoothedValue
from util.progress import Progress


def flags(folder="", epochs=5):
    return argparse.Namespace(output_dir=str(folder), epochs=epochs, tensorboard=bool(folder))


def scalars(folder):
    """Steps and values by name, as TensorBoard shows them."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
            for name in events.Tags()["scalars"]}


@pytest.fixture
def clock(monkeypatch):
    """A clock to be set by hand."""
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "perf_counter", lambda: Clock.now)
    return Clock


def run_lines(follower, clock, epoch, steps, seconds):
    for step in range(steps):
        clock.now += seconds
        if step % 10 == 0:
            follower.line(epoch, step, MetricLogger())


def test_the_estimate_comes_once_and_leaves_out_the_first_step(clock, capsys):
    follower = Progress(flags(), first_epoch=2, steps=90)
    clock.now += 1000  # the first step
    run_lines(follower, clock, 2, 90, 2.0)
    run_lines(follower, clock, 3, 90, 1.0)
    assert capsys.readouterr().out == ("estimated time: 0:03:00 per epoch, 0:09:00 to the end of epoch 4, evaluations not "
                                       "counted\n")


def test_short_epochs_are_not_estimated(clock, capsys):
    follower = Progress(flags(), first_epoch=0, steps=20)
    for epoch in range(5):
        run_lines(follower, clock, epoch, 20, 2.0)
    assert capsys.readouterr().out == ""


def line(follower, epoch, step, loss):
    logger = MetricLogger()
    logger.add_meter("lr", SmoothedValue(window_size=1))
    logger.update(lr=0.1, loss=loss, loss_unscaled=7.0)
    follower.line(epoch, step, logger)


def test_scalars_per_line_and_per_epoch(tmp_path):
    follower = Progress(flags(tmp_path), first_epoch=0, steps=11)
    for epoch in range(2):
        for step in (0, 10):
            line(follower, epoch, step, 1.0 + step)
        follower.epoch(epoch, {"train_loss": 3.0, "test_coco_eval_bbox": [i / 10 for i in range(12)], "epoch": epoch,
                               "test_PQ_all": {"pq": 0.5}, "n_parameters": 9})
    follower.close()
    found = scalars(tmp_path)
    assert found["step/loss"] == [(0, 1), (10, 11), (11, 1), (21, 11)]
    assert found["step/lr"] == [(0, 0.1), (10, 0.1), (11, 0.1), (21, 0.1)]
    assert found["epoch/train_loss"] == [(0, 3), (1, 3)]
    assert found["epoch/test_bbox_AP"] == [(0, 0), (1, 0)] and found["epoch/test_bbox_AR1"] == [(0, 0.6), (1, 0.6)]
    assert found["epoch/test_PQ_all_pq"] == [(0, 0.5), (1, 0.5)]
    assert len(found) == 2 + 1 + 12 + 1


def test_a_resumed_run_goes_on_and_hides_what_it_redoes(tmp_path):
    """The first run is stopped in epoch 1, behind its checkpoint of epoch 0."""
    first = Progress(flags(tmp_path), first_epoch=0, steps=20)
    for epoch, step in ((0, 0), (0, 10), (1, 0), (1, 10)):
        line(first, epoch, step, 1.0)
        first.epoch(epoch, {"train_loss": 1.0})
    first.close()
    second = Progress(flags(tmp_path), first_epoch=1, steps=20)
    line(second, 1, 0, 2.0)
    second.close()
    assert scalars(tmp_path)["step/loss"] == [(0, 1), (10, 1), (20, 2)]


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="^--tensorboard needs the package tensorboard, .*: pip install -r "
                                         "requirements/tensorboard.txt$"):
        Progress(flags(tmp_path), 0, 1)
    assert not Progress(flags(), 0, 1).writer


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(InputError, match="^--tensorboard: could not write .*tensorboard "):
        Progress(flags(tmp_path), 0, 1)
