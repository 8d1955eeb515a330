"""Training steps and inference: time, parts, share of the machine's peak, memory, and what the host waits for."""
import argparse
import contextlib
import statistics
from typing import Any, Dict, Iterator

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from models import fused
from tools.benchmark.contender import AMP_TYPES, Model
from tools.benchmark.counting import Flops, HostReads, Stopwatch, cuda_events
from tools.benchmark.machine import PeakMemory
from tools.benchmark.peers import HUGGING_FACE, contest
from tools.benchmark.workloads import SEED, WORKLOADS, make_batch, model_flags, parse_main_flags, size_of

COMPONENT_STEPS = 3


def measure_step(name: str, args: argparse.Namespace, peak: float) -> Dict[str, Any]:
    """All figures of one of `WORKLOADS`; see docs/speed.md.

    Args:
        peak: operations per second of matrix products in the type that `--amp` says.
    """
    workload = WORKLOADS[name]
    words = model_flags(workload.flags, args)
    options = parse_main_flags(words)
    batch_size = args.train_batch if workload.training else args.inference_batch
    height, width = size_of(workload, args)
    batch = make_batch(workload.dataset_file, options, batch_size, (height, width))
    kind = "training" if workload.training else "inference"
    ours, result = contest(kind, {"flags": words, "data": batch, "seed": SEED, "weights": None}, args, batch_size,
                           {HUGGING_FACE: {"options": vars(options)}} if workload.at_hugging_face else {})
    result = {"title": workload.title, "images": batch_size, "size": [height, width], **result, **inside(ours)}
    rate = result["flops"] / result["ours"]["median_ms"] * 1000
    return {**result, "gflops_per_s": rate / 1e9, "share_of_peak": rate / peak}


def inside(contender: Model) -> Dict[str, Any]:
    """Of single steps: floating point operations, reads by the host, operators, peak memory, and the parts' times."""
    device = contender.device
    flops, reads, memory = Flops(), HostReads(), PeakMemory(device)
    watch = Stopwatch(device)
    events: Dict[str, int] = {}

    def turns() -> Iterator[None]:
        yield  # a training prints a line at its first step, and reads what it prints
        for context in (memory, flops, reads):
            with context:
                yield
        if device.type == "cuda":
            with cuda_events() as counts:
                yield
            events.update(counts)
        with parts_watched(watch, contender):
            for _ in range(COMPONENT_STEPS):
                watch.step()
                yield
            watch.step()  # ends the last one

    with fused.steps(counted=True):
        contender.run(turns())
    result = {"flops": flops.total, "host_reads_per_step": sum(reads.reads.values()),
              "host_reads": dict(reads.reads), "operators_per_step": reads.operators, "peak_memory_mb": memory.mb,
              "memory_before_mb": memory.before_mb, "components_ms": median_parts(watch)}
    if events:
        result.update(host_waits_per_step=events["waits"], kernels_per_step=events["kernels"])
    return result


@contextlib.contextmanager
def parts_watched(watch: Stopwatch, contender: Model) -> Iterator[None]:
    """Put the stopwatch on the parts of a model and of its training step, for good; on optimizers, in the block."""
    model = contender.model
    watch.watch(model.backbone, "forward", "backbone on images")
    watch.watch(model, "patch_features", "backbone on patches")
    compiled = getattr(model.transformer, "_compiled_call_impl", None)  # what is compiled can't be watched from within
    for method in ("_compiled_call_impl",) if compiled else ("forward", "encode", "decode"):
        watch.watch(model.transformer, method, "transformer")
    watch.watch(model, "predictions", "heads")
    watch.watch(contender.postprocessors["bbox"], "forward", "post-processing")
    criterion = contender.criterion
    if criterion.embedder is not None:
        watch.watch(criterion, "embedder", "embeddings of regions")
    criterion.register_forward_pre_hook(lambda *_: watch.swap("criterion"))
    criterion.register_forward_hook(lambda *_: watch.swap("backward"))
    on_optimizers = [register_optimizer_step_pre_hook(lambda *_: watch.swap("optimizer")),
                     register_optimizer_step_post_hook(lambda *_: watch.swap("other"))]
    yield
    for hook in on_optimizers:
        hook.remove()


def median_parts(watch: Stopwatch) -> Dict[str, float]:
    """Milliseconds of each part, medians over the steps."""
    steps = watch.steps[:-1]
    names = sorted(set().union(*steps), key=lambda name: -steps[-1][name])
    return {name: 1000 * statistics.median(step[name] for step in steps) for name in names}


def peak_type(args: argparse.Namespace) -> torch.dtype:
    """The type whose matrix products set the peak."""
    return AMP_TYPES.get(args.amp, torch.float32)
