"""The tool that fills a cache of proposals, as users run it: in parallel, stopped in the middle, started again."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from datasets.proposal_cache import ProposalCache
from tools import cache_proposals
from tools.cache_proposals import SECONDS_PER_LINE, ProgressLine
from util.errors import InputError


def entries_of(cache_path):
    cache = ProposalCache(cache_path)
    return {name: entry.regions for part in range(cache.num_parts) for name, entry in cache.read(part).items()}


@pytest.fixture
def images(tmp_path):
    """40 images of noise in coarse squares."""
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = tmp_path / f"images/{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((80, 60), Image.Resampling.NEAREST).save(path)
    return tmp_path / "images"


def fill(images, cache_path, *flags):
    """Runs the tool in this process."""
    cache_proposals.main(cache_proposals.get_args_parser().parse_args(
        ["--imagenet_path", str(images), "--cache_path", str(cache_path), *flags]))


@pytest.mark.parametrize("end, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_was_stopped_goes_on(root, images, tmp_path, end, status, capsys):
    cache_path = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.cache_proposals", "--imagenet_path", images, "--cache_path", cache_path,
         "--num_workers", "2"], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    while len(list(cache_path.glob("proposals-*.npz"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(end)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    if end == signal.SIGINT:
        assert "stopped; what is done stays" in errors and "Traceback" not in errors
    time.sleep(0.3)   # its processes notice
    there = len(entries_of(cache_path))   # every part can be read
    assert 0 < there < 40
    fill(images, cache_path, "--num_workers", "0")
    assert f"of 40 images; {40 - there} were new, 0 could not be read" in capsys.readouterr().out
    assert len(entries_of(cache_path)) == 40


def test_processes_share_the_work_and_change_nothing(images, tmp_path, capsys):
    few = images / "1"
    for workers in ("0", "2"):
        fill(few, tmp_path / workers, "--num_workers", workers)
        first = capsys.readouterr().out.splitlines()[0]
        assert first == (f"{few}: regions of 13 images, into {tmp_path / workers}, by "
                         + ("1 process" if workers == "0" else "2 processes"))
    one, two = entries_of(tmp_path / "0"), entries_of(tmp_path / "2")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert not [path for path in (tmp_path / "2").iterdir() if path.name.startswith(".")]


def test_mistakes_end_in_a_sentence(images, tmp_path):
    with pytest.raises(InputError, match="^image folder .*nowhere does not exist$"):
        fill(tmp_path / "nowhere", tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="^--cache_path .*file/cache can't be written"):
        fill(images, tmp_path / "file/cache")
    with pytest.raises(InputError, match="^--num_workers -1 must be at least 0$"):
        fill(images, tmp_path / "cache", "--num_workers", "-1")


def test_progress_is_one_changing_line_on_a_terminal_and_a_line_now_and_then_elsewhere():
    times = iter([0.0, 10.0, SECONDS_PER_LINE + 10.0, SECONDS_PER_LINE + 20.0])
    written = []
    line = ProgressLine(4000, written.append, False, lambda: next(times))
    for done in (1000, 2000, 2100):
        line.update(done, done - 1000)
    line.clear()
    assert written == ["2,000 of 4,000 images (50.0%), 25.0 a second, about 0:01:20 left\n"]
    times, written = iter([0.0, 10.0, 20.0]), []
    line = ProgressLine(4000, written.append, True, lambda: next(times))
    line.update(1000, 0)
    line.update(3000, 2000)
    line.clear()
    assert written[:2] == ["\r1,000 of 4,000 images (25.0%)",
                           "\r3,000 of 4,000 images (75.0%), 100.0 a second, about 0:00:10 left"]
    assert written[2].strip() == ""
