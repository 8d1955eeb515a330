"""Averages by hand, the console line's form, and that logging reads no tensor before a line is printed."""
import re
import statistics

import pytest
import torch

from util.metric_logger import MetricLogger, SmoothedValue, merge_states


def test_statistics_by_hand():
    meter = SmoothedValue(window_size=3)
    for value in (10, 1, 5, 3):
        meter.update(value)
    # The window holds 1, 5, 3; all four count for the global average.
    assert (meter.median, meter.avg, meter.max, meter.value) == (3, 3, 5, 3)
    assert meter.global_avg == 19 / 4
    assert str(meter) == "3.0000 (4.7500)"


def test_values_stand_for_as_many_samples_as_they_say():
    meter = SmoothedValue()
    meter.update(2.0, n=3)
    meter.update(torch.tensor(6.0), n=1)
    assert meter.global_avg == 3 and meter.avg == 4


def test_an_even_window_has_its_lower_median():
    """As torch.median, and as the originals' logs."""
    meter = SmoothedValue()
    for value in (4, 1, 3, 2):
        meter.update(value)
    assert meter.median == 2 == statistics.median_low([4, 1, 3, 2])


@pytest.mark.parametrize("fmt, expected", [("{value:.6f}", "0.000100"), ("{avg:.1f}|{max:.1f}", "0.0|0.0"),
                                           ("{median:.4f} ({global_avg:.4f})", "0.0001 (0.0001)")])
def test_formats(fmt, expected):
    meter = SmoothedValue(fmt=fmt)
    meter.update(1e-4)
    assert str(meter) == expected


def test_tensors_and_numbers_mix_in_any_order():
    for values in ((1.0, torch.tensor(2.0)), (torch.tensor(1), 2),
                   (torch.tensor(1.0).bfloat16(), torch.tensor(2.0).double())):
        meter = SmoothedValue()
        for value in values:
            meter.update(value)
        assert meter.global_avg == 1.5
        figures = meter.global_avg, meter.value
        assert not any(isinstance(figure, torch.Tensor) for figure in figures), "log.txt holds numbers"


def test_a_meter_without_values_is_not_a_number():
    assert str(SmoothedValue()) == "nan (nan)"


def test_updates_do_not_read_tensors(host_reads):
    logger = MetricLogger()
    losses = [torch.tensor(float(i), requires_grad=True) for i in range(30)]
    with host_reads:
        for loss in losses:
            logger.update(loss=loss, other=loss * 2)
        assert not host_reads.waited
    assert logger.loss.global_avg == 14.5 and logger.other.global_avg == 29
    assert not any(isinstance(value, torch.Tensor) for value in logger.loss.window)


def test_a_whole_loop_reads_only_where_it_prints(host_reads, capsys):
    logger = MetricLogger(delimiter="  ")
    reads_after_step = []
    for step in logger.log_every(range(25), 10, "Epoch: [0]"):
        with host_reads:
            logger.update(loss=torch.tensor(float(step)))
        reads_after_step.append(len(host_reads.waited))
    assert reads_after_step == [0] * 25
    assert len(capsys.readouterr().out.splitlines()) == 4 + 1


def test_values_do_not_pile_up_where_nothing_is_printed(monkeypatch):
    """Processes other than the main one print nothing; device tensors must not wait there for the epoch's end."""
    monkeypatch.setattr("util.distributed.get_rank", lambda: 1)
    logger = MetricLogger()
    for step in logger.log_every(range(100), 10):
        logger.update(loss=torch.tensor(float(step)))
        assert len(logger.loss._pending) <= 11
    assert logger.loss.global_avg == 49.5


LINE = re.compile(r"^Epoch: \[3\]  \[ *(?P<step>\d+)/225\]  eta: \d+:\d\d:\d\d  lr: \d\.\d{6}  class_error: \d+\.\d\d  "
                  r"loss: \d+\.\d{4} \(\d+\.\d{4}\)  time: \d+\.\d{4}  data: \d+\.\d{4}(  max mem: \d+)?$")


def test_console_lines(capsys):
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    logger.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    for step in logger.log_every(range(225), 10, "Epoch: [3]"):
        logger.update(lr=1e-4, class_error=torch.tensor(12.5), loss=torch.tensor(12.0 + step / 1000))
    *lines, last = capsys.readouterr().out.splitlines()
    matches = [LINE.match(line) for line in lines]
    assert all(matches), lines
    assert [int(match["step"]) for match in matches] == [*range(0, 225, 10), 224]
    assert "[ 10/225]" in lines[1] and "[224/225]" in lines[-1]
    # The last 20 values are 12.205 … 12.224, whose lower median is 12.214; the average of all is 12.112.
    assert "  loss: 12.2140 (12.1120)  " in lines[-1]
    assert re.fullmatch(r"Epoch: \[3\]  Total time: \d+:\d\d:\d\d \(\d+\.\d{4} s / it\)", last)


def test_averages_and_attributes():
    logger = MetricLogger()
    logger.update(loss=1, lr=0.5)
    logger.update(loss=3)
    assert logger.averages() == {"loss": 2, "lr": 0.5}
    assert logger.loss.value == 3
    assert str(logger) == "loss: 1.0000 (2.0000)\tlr: 0.5000 (0.5000)"
    with pytest.raises(AttributeError, match="neither an attribute nor a meter named 'losss'"):
        logger.losss


def test_an_empty_loader(capsys):
    assert list(MetricLogger().log_every([], 10, "Test:")) == []
    assert "Total time" in capsys.readouterr().out


def test_a_logger_goes_on_from_a_state():
    """Averages come out bit for bit; of more processes than now the first takes over what all have seen."""
    values = torch.rand(30, generator=torch.Generator().manual_seed(1))
    whole, first, second = MetricLogger(), MetricLogger(), MetricLogger()
    for i, value in enumerate(values):
        whole.update(loss=value)
        if i == 13:
            second.load_state_dict(first.state_dict())
        (first if i < 13 else second).update(loss=value)
    assert second.averages() == whole.averages() and str(second) == str(whole)

    merged = merge_states([{"loss": {"total": 6.0, "count": 3, "window": [1.0]}}, {},
                           {"loss": {"total": 10.0, "count": 1, "window": [10.0]}}])
    logger = MetricLogger()
    logger.load_state_dict(merged)
    assert logger.loss.global_avg == 4 and logger.loss.value == 1


def test_items_are_counted_on(capsys):
    assert list(MetricLogger(delimiter="  ").log_every("abc", 2, "Epoch: [0]", first=9)) == ["a", "b", "c"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  eta")[0] for line in lines[:2]] == ["Epoch: [0]  [10/12]", "Epoch: [0]  [11/12]"]


def test_the_figures_of_all_meters_are_read_at_once(monkeypatch):
    """On a GPU each read waits for the device."""
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    logger = MetricLogger()
    for step in range(3):
        logger.update(a=torch.tensor(1.0 + step), b=torch.tensor(10.0), c=2)
        logger.meters["a"].update(torch.tensor(4.0), weight=0.5)
    states = logger.state_dict()
    assert reads == [(9,)]
    assert states["a"]["total"] == 1 + 2 + 3 + 3 * 2 and states["b"]["total"] == 30 and states["c"]["total"] == 6
