"""What is found in a training step, when, and what is told of it."""
import os
import signal

import pytest
import torch

from util import signals
from util.signals import SAVE, SignalListener
from util.watch import MOST_OVERFLOWS, StepWatch

CPU = torch.device("cpu")
WEIGHTS = {"loss_a": 1.0, "loss_b": 2.0}
FINE = {"loss_a": 1.0, "loss_b": 2.0, "cardinality_error": 3.0}


def take(watch, step, losses, norm=1.0, epoch=4, **options):
    """A step up to its last line."""
    watch.begin(epoch, step, [{"image_id": torch.tensor([10 * step]), "boxes": torch.zeros(1, 4),
                               "masks": torch.zeros(200, 200)}])
    with watch.matching():
        pass
    total = torch.tensor(sum(losses[name] * weight for name, weight in WEIGHTS.items()))
    return watch.reduce({name: torch.tensor(value) for name, value in losses.items()}, total, torch.tensor(norm), **options)


@pytest.mark.parametrize("losses, norm, words", [
    ({**FINE, "loss_b": float("nan")}, 1.0, "the loss became infinite or NaN: loss_b"),
    ({**FINE, "loss_a": float("inf"), "loss_b": float("nan")}, 1.0, "the loss became infinite or NaN: loss_a, loss_b"),
    (FINE, float("inf"), "the gradient became infinite or NaN, that of finite losses")])
def test_a_step_that_went_wrong_is_told_of_in_the_next_with_all_that_is_known(losses, norm, words):
    bundles = []
    watch = StepWatch(CPU, on_failure=lambda bundle: bundles.append(bundle) or "; a hint")
    take(watch, 0, FINE)
    before = torch.get_rng_state()
    take(watch, 1, losses, norm)
    torch.rand(3)
    watch.begin(4, 2, [{"image_id": torch.tensor([99])}])
    with pytest.raises(FloatingPointError) as caught, watch.matching():
        raise FloatingPointError("the weights of step 1 show in step 2")
    assert str(caught.value) == f"{words} (epoch 4, step 1, image ids 10); a hint"
    bundle, = bundles
    assert (bundle["epoch"], bundle["step"], bundle["image_ids"]) == (4, 1, [10])
    assert str(bundle["losses"]) == str({name: float(value) for name, value in losses.items()})
    assert set(bundle["targets"][0]) == {"image_id", "boxes"}, "small"
    assert torch.equal(bundle["random_state"]["cpu"], before)


def test_a_prediction_that_is_not_finite_is_of_its_own_step():
    watch = StepWatch(CPU)
    take(watch, 0, FINE)
    watch.begin(4, 1, [{"image_id": torch.tensor([7])}])
    with pytest.raises(FloatingPointError, match=r"^no number \(epoch 4, step 1, image ids 7\)$"), watch.matching():
        raise FloatingPointError("no number")


def test_the_end_of_an_epoch_waits_for_its_last_step():
    watch = StepWatch(CPU)
    take(watch, 0, {**FINE, "cardinality_error": float("nan")})
    watch.end()  # figures without a weight don't count
    take(watch, 1, {**FINE, "loss_a": float("nan")})
    with pytest.raises(FloatingPointError, match="loss_a"):
        watch.end()
    watch.end()


def test_overflows_are_counted_and_not_without_end():
    watch = StepWatch(CPU)
    assert "overflow" not in take(watch, 0, FINE)
    for step in range(MOST_OVERFLOWS):
        assert take(watch, step, FINE, float("inf"), may_overflow=True)["overflow"] == 1
    assert take(watch, 50, FINE, 1.0, may_overflow=True)["overflow"] == 0
    for step in range(MOST_OVERFLOWS + 1):
        take(watch, step, FINE, float("nan"), may_overflow=True)
    with pytest.raises(FloatingPointError, match=f"the gradient became infinite or NaN.*step {MOST_OVERFLOWS}"):
        watch.end()


def test_what_signals_ask_for_is_read_a_step_later():
    listener = SignalListener({})
    watch = StepWatch(CPU, listener)
    listener.save = True
    reduced = take(watch, 0, FINE)
    assert set(reduced) == {*FINE, "loss"} and reduced["loss"] == 5 and not watch.save
    listener.save = False
    take(watch, 1, FINE)
    assert watch.save and not watch.stop
    listener.stop = True
    take(watch, 2, FINE)
    watch.settle()
    assert watch.stop


def test_nothing_of_it_waits_for_the_device(host_reads):
    watch = StepWatch(CPU)
    take(watch, 0, FINE)
    with host_reads:
        take(watch, 1, FINE, may_overflow=True)
    assert not host_reads.waited


def test_signals_that_save_and_go_on():
    before = signal.getsignal(signal.SIGUSR1)
    with SignalListener({signal.SIGUSR1: SAVE}) as listener:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (listener.save, listener.stop, listener.heard) == (True, False, "SIGUSR1")
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_interrupt_is_for_the_impatient(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with SignalListener() as listener:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, by way of a launcher
        assert listener.stop
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
