"""Break a small training in every way and see that nothing is lost: `python -m tools.torture`

Trains a tiny DETR on a made-up data set, first undisturbed, then again while at random moments its processes are killed,
told to stop or interrupted, its disk fills up, its newest checkpoint is garbled or cut, a loading process is killed, or one
of two processes that train together. Each time the training is started again with --resume auto. In the end its weights and
its log.txt must be the same, bit for bit, as those of the undisturbed one. In other rounds images are deleted, cut or
emptied while it runs: it must come to its end, count them, and write a whole log. A training that takes longer than a minute
to end after a fault counts as hanging.

Prints each fault, then a table; the exit status is 0 if nothing was lost. The small disk that fills up is one in memory where
it may be mounted (as root), else no file may grow beyond a limit. CPU only; some seconds for each ten faults.
"""
import argparse
import json
import random
import shutil
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch

from datasets.toy import ToySettings, write_toy
from tools.torture.attempts import Attempt, warm_up
from tools.torture.faults import DISK_MB, ON_IMAGES, ON_RUNS, ON_TWO_PROCESSES, Fault, Place, SmallDisk
from util.checkpoint import load_checkpoint
from util.errors import InputError, run_program
from util.ranges import TOOL_RANGES, check_ranges
from util.saving import newest_checkpoint

EPOCHS, IMAGES = 4, 24
HANGS_AFTER_S = 60
OVER = "Training time"  # begins the last line of a training
TRAINING = (f"--device cpu --epochs {EPOCHS} --lr_drop 2 --eval_every 2 --resume auto --save_every_steps 2 --dist_timeout 20 "
            "--backbone resnet18 --backbone_last_layer layer3 --load_backbone none --lr_backbone 0 --hidden_dim 32 --nheads 2 "
            "--dim_feedforward 64 --enc_layers 1 --dec_layers 2 --num_queries 10 --num_workers 1 --train_sizes 64 72 80 "
            "--val_size 64 --max_size 96").split()
# Of each ten rounds' faults: those of a training in one process, in two, and of the images.
KINDS: Dict[str, Tuple[int, Dict[str, Fault], int]] = {
    "one process": (1, ON_RUNS, 6), "two processes": (2, ON_TWO_PROCESSES, 3), "images": (1, ON_IMAGES, 1)}


@dataclass
class Tally:
    """What came of the faults of a kind."""

    injected: int = 0
    resumed: int = 0
    lost_steps: List[int] = field(default_factory=list)


class Torture:
    """Trainings of one kind ("one process", …), tortured in rounds.

    Args:
        kind: key of `KINDS`.
        data: toy data set.
        folder: scratch folder.
        disk: where --output_dir goes.
        seed: decides what happens when.
    """

    def __init__(self, kind: str, data: Path, folder: Path, disk: SmallDisk, seed: int) -> None:
        self.kind, self.data, self.folder, self.disk = kind, data, folder, disk
        self.num_processes, self.faults, _ = KINDS[kind]
        self.steps_per_epoch = IMAGES // 2
        self.rng = random.Random(f"{seed} {kind}")
        self.tallies: Dict[str, Tally] = defaultdict(Tally)
        self.failures: List[str] = []
        self.starts = 0
        self.straight = folder / f"straight-{self.num_processes}"
        self.deck: List[str] = []
        self.latest: Optional[Attempt] = None
        self.waiting: List[Tuple[str, Optional[int]]] = []  # faults not gone on from yet, and the steps taken before them

    def run(self, num_faults: int) -> None:
        """Torture until so many faults were injected or something was lost."""
        self.until_first_step, self.stepping = self.train_undisturbed()
        left = num_faults
        for _ in range(10 * num_faults):  # a round may come to its end before anything happens
            if left > 0 and not self.failures:
                left -= self.one_round(left)

    def stop(self) -> None:
        """End the processes of the latest attempt, if they still run."""
        if self.latest:
            self.latest.kill()

    def train_undisturbed(self) -> Tuple[float, float]:
        """The training to compare with; returns the seconds until its first step, and from there to its end."""
        attempt = self.start(self.straight, self.data, "straight")
        attempt.wait(10 * HANGS_AFTER_S, lambda: attempt.steps_done() is not None)
        first = time.monotonic() - attempt.started
        attempt.wait(10 * HANGS_AFTER_S)
        if set(attempt.codes) != {0}:
            raise InputError(f"the undisturbed training failed, see {attempt.output}")
        return first, time.monotonic() - attempt.started - first

    def start(self, output: Path, data: Path, name: str) -> Attempt:
        self.starts += 1
        flags = [*TRAINING, "--coco_path", str(data / "coco"), "--output_dir", str(output),
                 "--batch_size", str(2 // self.num_processes)]
        self.latest = Attempt(flags, self.num_processes, self.folder / f"{self.kind.replace(' ', '-')}-{name}.txt")
        return self.latest

    def one_round(self, most: int) -> int:
        """One training from its beginning to its end, with `most` faults at most; returns how many there were."""
        place = self.fresh_place()
        done, starts, finished = 0, 0, False
        while not finished:
            attempt = self.start(place.output, place.images.parents[1], f"{self.starts:03}")
            starts += 1
            name = self.draw() if done < most else ""
            happened = self.disturb(attempt, place, name) if name else False
            if not attempt.wait(HANGS_AFTER_S if happened else 10 * HANGS_AFTER_S):
                self.fail(attempt, f"hangs after: {name or 'nothing'}")
                attempt.kill()
                attempt.wait(10)
                break
            self.account(attempt)
            if happened:
                done += 1
                self.waiting.append((name, attempt.steps_done()))
                self.tallies[name].injected += 1
                self.check_end(attempt, name)
                self.faults[name].heal(place)
                print(f"{self.kind}: {name}; exit status {', '.join(map(str, attempt.codes))}", flush=True)
            elif set(attempt.codes) != {0}:
                self.fail(attempt, "failed though nothing was done to it")
                break
            finished = set(attempt.codes) == {0}
        if finished:
            for name, _ in self.waiting:  # it came to its end in spite of it
                self.tallies[name].resumed += 1
            self.waiting.clear()
            self.compare(place, attempt, done, starts)
        return done

    def fresh_place(self) -> Place:
        data, output = self.data, self.disk.folder / "out"
        shutil.rmtree(output, ignore_errors=True)
        if self.faults is ON_IMAGES:
            data = self.folder / "spoilt"
            shutil.rmtree(data, ignore_errors=True)
            shutil.copytree(self.data, data)
        output.mkdir()
        return Place(output, data / "coco" / "train2017", (self.straight / "checkpoint.pth").stat().st_size,
                     self.disk.is_mounted)

    def draw(self) -> str:
        """Each kind of fault comes once before one comes again."""
        if not self.deck:
            self.deck = list(self.faults)
            self.rng.shuffle(self.deck)
        return self.deck.pop()

    def disturb(self, attempt: Attempt, place: Place, name: str) -> bool:
        """Inject a fault at a random moment; returns whether the attempt lived so long."""
        fault, span = self.faults[name], 0.4 * self.stepping
        if fault.while_stepping:
            attempt.wait(HANGS_AFTER_S, lambda: attempt.steps_done() is not None)
            attempt.wait(self.rng.uniform(0, span))
        else:
            attempt.wait(self.rng.uniform(0, self.until_first_step + 2 * span))
        if attempt.has_ended or not fault.inject(attempt, place, self.rng):
            self.deck.append(name)
            return False
        return True

    def account(self, attempt: Attempt) -> None:
        """Note where the attempt after one fault, or several, went on; nothing if it didn't come so far."""
        resumed_at = attempt.resumed_at(self.steps_per_epoch)
        if resumed_at is None:
            return
        for name, reached in self.waiting:
            self.tallies[name].resumed += 1
            if reached is not None:
                self.tallies[name].lost_steps.append(max(0, reached - resumed_at))
        self.waiting.clear()

    def check_end(self, attempt: Attempt, name: str) -> None:
        fault = self.faults[name]
        if OVER in attempt.text:
            return  # it came too late to do anything; the next start finds that there is nothing to do
        if not set(attempt.codes) <= fault.ends:
            self.fail(attempt, f"{name}: exit status {attempt.codes}")
        if not fault.may_trace and "Traceback" in attempt.text:
            self.fail(attempt, f"{name}: a traceback")

    def compare(self, place: Place, attempt: Attempt, done: int, starts: int) -> None:
        """Compare the training, which has come to its end, with the undisturbed one."""
        lines = [json.loads(line) for line in (place.output / "log.txt").read_text().splitlines()]
        if [line["epoch"] for line in lines] != list(range(EPOCHS)):
            self.fail(attempt, f"log.txt has the epochs {[line['epoch'] for line in lines]}")
        if self.faults is ON_IMAGES:
            verdict = f"{lines[-1]['unreadable_images']} unreadable images counted"
            if lines[-1]["unreadable_images"] != attempt.text.count("passed over:"):
                self.fail(attempt, f"{attempt.text.count('passed over:')} images were passed over, but {verdict}")
        else:
            # Of a training that was over when its last checkpoint was spoilt, the last epoch's own is the end.
            mine, other = (load_checkpoint(newest_checkpoint(str(folder)))["model"]
                           for folder in (place.output, self.straight))
            same_weights = mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in other)
            same_log = (place.output / "log.txt").read_text() == (self.straight / "log.txt").read_text()
            verdict = " and ".join(f"{what} {'the same' if same else 'DIFFERENT'}" for what, same in (
                ("weights", same_weights), ("log.txt", same_log)))
            if not (same_weights and same_log):
                self.fail(attempt, verdict)
        print(f"{self.kind}: the end after {done} faults in {starts} starts: {verdict}", flush=True)

    def fail(self, attempt: Attempt, what: str) -> None:
        self.failures.append(f"{self.kind}: {what} ({attempt.output})")
        print(f"FAILED {self.failures[-1]}", flush=True)


def shares(num_faults: int) -> Dict[str, int]:
    """How many faults each kind of training gets."""
    total = sum(weight for _, _, weight in KINDS.values())
    counts = {kind: num_faults * weight // total for kind, (_, _, weight) in KINDS.items()}
    counts["one process"] += num_faults - sum(counts.values())
    return counts


def table(tallies: Dict[str, Tally]) -> str:
    """A line for each kind of fault."""
    lines = [f"{'fault':40} injected  resumed  steps lost: mean  most"]
    for name, tally in tallies.items():
        lost = tally.lost_steps or [0]
        lines.append(f"{name:40} {tally.injected:8} {tally.resumed:8} {sum(lost) / len(lost):17.1f} {max(lost):5}")
    return "\n".join(lines)


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.torture", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, default=0, help="decides which faults come when, as far as clocks allow (0)")
    parser.add_argument("--output_dir", help="new folder for what the trainings print and write (one that is deleted)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Torture and report; exits with status 1 if anything was lost."""
    check_ranges(args, TOOL_RANGES)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unmounts the disk, as Ctrl-C does
    with SmallDisk() as disk:
        folder = Path(args.output_dir or disk.scratch)
        if args.output_dir and folder.exists():
            raise InputError(f"--output_dir {folder} exists already: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        print(f"what fills up: {f'a disk of {DISK_MB} MB in memory' if disk.is_mounted else 'the size that a file may have'}")
        write_toy(folder / "toy", ToySettings(image_size=64, num_unlabelled=1, num_train=IMAGES, num_val=2))
        tallies: Dict[str, Tally] = {}
        failures: List[str] = []
        warm_up()
        for kind, count in shares(args.faults).items():
            if count:
                torture = Torture(kind, folder / "toy", folder, disk, args.seed)
                try:
                    torture.run(count)
                finally:
                    torture.stop()
                tallies.update(torture.tallies)
                failures += torture.failures
    print(table(tallies))
    print(f"{sum(tally.injected for tally in tallies.values())} faults, {len(failures) or 'none'} lost")
    if failures:
        print("\n".join(failures), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
