"""Propose regions of all images of a folder tree once, for DETReg's pre-training:

    python -m tools.cache_proposals --imagenet_path data/ilsvrc/train --cache_path cache/ilsvrc --num_workers 16

A run that was stopped goes on where it was when it is started again, and one on a tree that has grown or changed does
what is new. Several runs at once on one cache do no harm, but the same work.
"""
import argparse
import contextlib
import datetime
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
import torch

from datasets.image_io import UnreadableImage
from datasets.pretext import keep_classes, list_images
from datasets.proposal_cache import Entry, ProposalCache
from datasets.selective_search import count_boxes, propose_regions, require_opencv
from util.errors import InputError, run_program
from util.parallel import available_cpus, imap_in_processes
from util.ranges import TOOL_RANGES, check_ranges

SECONDS_PER_LINE = 30  # between two lines of progress in a log; a terminal sees one line change


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m tools.cache_proposals", allow_abbrev=False,
                                     description="Compute and store the region proposals of a folder tree of images.")
    parser.add_argument("--imagenet_path", required=True, help="folder tree of images, as given to main.py")
    parser.add_argument("--cache_path", required=True, help="folder of the cache; made if it doesn't exist")
    parser.add_argument("--class_list", help="text file that names the folders (classes) to take, as for main.py")
    parser.add_argument("--num_workers", type=int, help="processes (one per CPU)")
    return parser


@dataclass
class Part:
    """What became of the images of one part of the cache."""

    num_images: int = 0
    num_new: int = 0
    num_regions: int = 0
    unreadable: List[str] = field(default_factory=list)


def fill_part(job: Tuple[str, str, int, Sequence[str]]) -> Part:
    """Propose regions of those images of a part that the cache doesn't know, or knows with another content.

    Args:
        job: top folder of the images, the cache's folder, the part's number and the relative paths of its images.
    """
    torch.set_num_threads(1)  # there is a process for each CPU
    root, folder, number, paths = job
    cache = ProposalCache(folder)
    entries = cache.read(number)
    done = Part(num_images=len(paths))
    for path in paths:
        try:
            entry = _propose(Path(root, path), entries.get(path))
            done.num_new += entry is not entries.get(path)
        except UnreadableImage as error:
            done.unreadable.append(str(error))
            entry = Entry(_file_size(Path(root, path)), np.zeros((0, 6), dtype=np.uint8))
        entries[path] = entry
        done.num_regions += count_boxes(entry.regions)
    if done.num_new or done.unreadable:
        cache.write(number, entries)
    return done


def _propose(path: Path, known: "Entry | None") -> Entry:
    """The entry of an image: the known one if it holds regions of the file as it is."""
    size = _file_size(path)
    if known is not None and len(known.regions) and known.file_size == size:
        return known
    return Entry(size, propose_regions(path))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # a broken link, say; reading it says what is wrong


class ProgressLine:
    """Says how far the work is: on a terminal in one line that changes, elsewhere in a line now and then.

    Args:
        total: number of images.
        write: prints text and nothing else.
        terminal: whether `write` goes to a terminal.
        clock: seconds.
    """

    def __init__(self, total: int, write: Callable[[str], object], terminal: bool,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.write, self.terminal, self.clock = total, write, terminal, clock
        self.start = self.last = clock()
        self.width = 0

    @classmethod
    def on_stdout(cls, total: int) -> "ProgressLine":
        """A line on standard output, which a program may lack."""
        terminal = sys.stdout is not None and sys.stdout.isatty()
        return cls(total, lambda text: print(text, end="", flush=True), terminal)

    def update(self, done: int, new: int) -> None:
        """Called with how many images are done, and how many of them weren't there before."""
        now = self.clock()
        if not self.terminal and now - self.last < SECONDS_PER_LINE:
            return
        self.last = now
        text = f"{done:,} of {self.total:,} images ({done / self.total:.1%})"
        if new and now > self.start:
            rate = new / (now - self.start)
            left = datetime.timedelta(seconds=round((self.total - done) / rate))
            text += f", {rate:.1f} a second, about {left} left"
        if self.terminal:
            self.write("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            self.write(text + "\n")

    def clear(self) -> None:
        """Called before other text is printed."""
        if self.terminal and self.width:
            self.write("\r" + " " * self.width + "\r")
            self.width = 0


def fill(args: argparse.Namespace) -> None:
    """Compute what the cache lacks, and print how it went."""
    check_ranges(args, TOOL_RANGES)
    require_opencv()
    files = list_images(args.imagenet_path)
    if args.class_list:
        files = keep_classes(files, args.class_list, args.imagenet_path)
    cache = ProposalCache.create(args.cache_path, len(files))
    jobs = [(args.imagenet_path, args.cache_path, number, [files[position] for position in positions])
            for number, positions in cache.parts_of(files).items()]
    workers = available_cpus() if args.num_workers is None else args.num_workers
    print(f"{args.imagenet_path}: regions of {len(files):,} images, into {args.cache_path}, by {max(workers, 1)} "
          f"{'processes' if workers > 1 else 'process'}", flush=True)
    start = time.monotonic()
    with _ending_at_interrupt():
        total = _follow(imap_in_processes(fill_part, jobs, workers), len(files))
    took = datetime.timedelta(seconds=round(time.monotonic() - start))
    average = total.num_regions / max(total.num_images - len(total.unreadable), 1)
    print(f"{args.cache_path}: {average:.0f} regions on average of {total.num_images:,} images; {total.num_new:,} were "
          f"new, {len(total.unreadable):,} could not be read; took {took}", flush=True)


def _follow(parts: Iterable[Part], num_images: int) -> Part:
    """Sum up the parts as they come, with progress on standard output and unreadable files on standard error."""
    total = Part()
    progress = ProgressLine.on_stdout(num_images)
    for part in parts:
        total.num_images += part.num_images
        total.num_new += part.num_new
        total.num_regions += part.num_regions
        total.unreadable += part.unreadable
        if part.unreadable:
            progress.clear()
        for sentence in part.unreadable:
            print(f"passed over: {sentence}", file=sys.stderr, flush=True)
        progress.update(total.num_images, total.num_new)
    progress.clear()
    return total


@contextlib.contextmanager
def _ending_at_interrupt() -> Iterator[None]:
    """Within, Ctrl-C ends the program and its processes at once, rather than when the parts in work are finished."""
    main_process = os.getpid()

    def end(*_: object) -> None:
        if os.getpid() == main_process:  # the terminal interrupts the others too; they end with this one
            os.write(sys.stderr.fileno(), b"\nstopped; what is done stays: the same command goes on from there\n")
            os._exit(130)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(args: argparse.Namespace) -> None:
    """Fill the cache."""
    try:
        fill(args)
    except OSError as error:
        raise InputError(f"--cache_path {args.cache_path} can't be written ({error})") from error


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
