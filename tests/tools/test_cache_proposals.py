"""The tool that fills a cache of proposals, run as a user does: in parallel, stopped in the middle, and started again."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from datasets.proposal_cache import ProposalCache
from tools.cache_proposals import SECONDS_PER_LINE, ProgressLine, duration


def entries_of(cache_path):
    cache = ProposalCache(cache_path)
    return {name: entry.boxes for part in range(cache.num_parts) for name, entry in cache.read(part).items()}


@pytest.fixture
def images(tmp_path):
    """40 images of noise in coarse squares."""
    for number in range(40):
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = tmp_path / f"images/{number % 3}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize((80, 60), Image.Resampling.NEAREST).save(path)
    return tmp_path / "images"


def command(root, images, cache_path, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return dict(args=[sys.executable, "-m", "tools.cache_proposals", "--imagenet_path", str(images), "--cache_path",
                      str(cache_path), *flags], cwd=root, env=environment, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE)


def run(*args):
    started = command(*args)
    program = started.pop("args")
    return subprocess.run(program, timeout=100, **started)


def wait_for_parts(process, cache_path, count):
    while len(list(cache_path.glob("proposals-*.npz"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("end, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_was_stopped_goes_on(root, images, tmp_path, end, status):
    cache_path = tmp_path / "cache"
    process = subprocess.Popen(**command(root, images, cache_path, "--num_workers", "2"))
    wait_for_parts(process, cache_path, 2)
    process.send_signal(end)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    if end == signal.SIGINT:
        assert "stopped; what is done stays in" in errors and "Traceback" not in errors
    there = len(entries_of(cache_path))   # every part can be read
    assert 0 < there < 40
    done = run(root, images, cache_path, "--num_workers", "2")
    assert done.returncode == 0, done.stderr
    assert f"of 40 images; {40 - len_of_rest(done)} were new" in done.stdout
    assert len(entries_of(cache_path)) == 40 and 0 < 40 - len_of_rest(done) <= 40 - there


def len_of_rest(done):
    """How many images a run found in the cache."""
    return 40 - int(done.stdout.split(" were new")[0].split()[-1])


def test_processes_share_the_work_and_change_nothing(root, images, tmp_path):
    for workers in ("0", "2"):
        done = run(root, images, tmp_path / workers, "--num_workers", workers)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].startswith(f"{images}: regions of 40 images, into {tmp_path / workers}, by ")
    one, two = entries_of(tmp_path / "0"), entries_of(tmp_path / "2")
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert not [path for path in (tmp_path / "2").iterdir() if path.name.startswith(".")]


def test_mistakes_end_in_a_sentence(root, images, tmp_path):
    done = run(root, tmp_path / "nowhere", tmp_path / "cache")
    assert done.returncode == 2 and done.stderr == f"error: image folder {tmp_path / 'nowhere'} does not exist\n"
    (tmp_path / "file").touch()
    done = run(root, images, tmp_path / "file" / "cache")
    assert done.returncode == 2 and done.stderr.startswith("error: --cache_path ") and "can't be written" in done.stderr


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
    assert written[2].strip() == "" and duration(3661) == "1:01:01"
