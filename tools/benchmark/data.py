"""Training samples made of photographs, and how long a real training waits for them."""
import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List

import main
from datasets import build_dataset
from tools.benchmark.contender import Training
from tools.benchmark.peers import TORCHVISION, contest
from tools.benchmark.photographs import DISTINCT, write_photographs
from tools.benchmark.rounds import LEAST_REPEATS, synchronize
from tools.benchmark.workloads import SEED, make_batch, model_flags, parse_main_flags

SAMPLES = {"updetr_sample": ("UP-DETR training sample", "--dataset_file imagenet --imagenet_path {}/unlabelled"),
           "coco_sample": ("COCO training sample", "--dataset_file coco --coco_path {}/coco"),
           "voc_sample": ("VOC training sample", "--dataset_file voc --voc_path {}/VOCdevkit")}
LOADERS = {"updetr_loader": ("UP-DETR pre-training with its loader",
                             SAMPLES["updetr_sample"][1] + " --fre_cnn --feature_recon"),
           "coco_loader": ("DETR fine-tuning with its loader", SAMPLES["coco_sample"][1])}
BATCHES = 32  # that the photographs suffice for


def measure_samples(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Time of one sample of `SAMPLES`, decoding included, in one process."""
    title, flags = SAMPLES[name]
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), DISTINCT, args.photo_size)
        words = model_flags(flags.format(folder), args)
        parse_main_flags(words)
        others = {} if name == "voc_sample" else {TORCHVISION: {}}
        result = contest("samples", {"flags": words, "seed": SEED}, args, 1, others)[1]
    return {"title": title, "images": 1, "size": args.photo_size, **result}


def measure_loader(name: str, args: argparse.Namespace) -> Dict[str, Any]:
    """A training with loading processes: time of a step, waiting included, and `data_wait_share`, the share of waiting.

    The first batch, for which the processes are started, counts as `first_batch_ms` alone.
    """
    title, flags = LOADERS[name]
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), BATCHES * args.train_batch, args.photo_size)
        words = model_flags(flags.format(folder), args) + ["--batch_size", str(args.train_batch)]
        options = parse_main_flags(words)
        batch = make_batch(options.dataset_file, options, 1, (64, 64))
        training = Training({"flags": words, "data": batch, "seed": SEED, "weights": None})
        loader = main.build_train_loader(build_dataset("train", training.args), training.args)
        timed = TimedLoader(loader, training, args.seconds)
        training.train_on(timed)
    (first, _), *steps = timed.times
    waits, totals = [wait for wait, _ in steps], [wait + work for wait, work in steps]
    return {"title": title, "images": args.train_batch, "size": args.photo_size, "workers": training.args.num_workers,
            "steps": len(steps), "data_wait_share": sum(waits) / sum(totals), "first_batch_ms": 1000 * first,
            "data_wait_ms": 1000 * statistics.median(waits), "step_ms": 1000 * statistics.median(totals),
            "images_per_s": args.train_batch * len(steps) / sum(totals)}


class TimedLoader:
    """A loader that keeps in `times` how long each batch was waited for and worked on; it ends when that is enough."""

    def __init__(self, loader: Iterable[Any], training: Training, seconds: float) -> None:
        self.loader, self.device, self.seconds = loader, training.device, seconds
        self.times: List[Any] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        begin = start = time.perf_counter()
        for batch in self.loader:
            come = time.perf_counter()
            yield batch
            synchronize(self.device)
            end = time.perf_counter()
            self.times.append((come - start, end - come))
            if len(self.times) > LEAST_REPEATS and end - begin > self.seconds:
                return
            start = time.perf_counter()
