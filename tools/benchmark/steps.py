"""Training steps and inference: time, parts, share of the machine's peak, memory, and what the host waits for."""
import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from tools.benchmark.contender import AMP_TYPES, Checkout
from tools.benchmark.counting import HostReads, Stopwatch, cuda_events
from tools.benchmark.machine import PeakMemory
from tools.benchmark.peers import HUGGING_FACE, WITH_HUGGING_FACE, Peer
from tools.benchmark.rounds import Rounds
from tools.benchmark.workloads import SEED, WORKLOADS, Workload, make_batch, model_flags, parse_main_flags, size_of

COMPONENT_STEPS = 3


def measure_step(name: str, args: argparse.Namespace, peaks: Dict[str, float]) -> Dict[str, Any]:
    """All figures of one of `WORKLOADS`; see docs/speed.md.

    Args:
        peaks: by type, the matrix product's operations per second.
    """
    workload = WORKLOADS[name]
    words = model_flags(workload.flags, args)
    options = parse_main_flags(words)
    batch_size = args.train_batch if workload.training else args.inference_batch
    height, width = size_of(workload, args)
    result: Dict[str, Any] = {"title": workload.title, "kind": "step", "images": batch_size, "size": [height, width]}
    with tempfile.TemporaryDirectory() as folder:
        batch = make_batch(workload.dataset_file, options, batch_size, (height, width))
        spec = {"flags": words, "batch": batch, "seed": SEED, "weights": None}
        ours = Checkout(spec)
        checked = ours.check()
        result["loss"] = checked["loss"]
        peers = start_peers(name, workload, args, options, {**spec, "batch": str(Path(folder) / "batch.pt")}, ours, folder)
        try:
            rounds = Rounds(args.seconds, ours.device, {peer.name: peer.turn for peer in peers})
            work(ours, workload)(rounds)
            result.update(rounds.results(batch_size))
        finally:
            for peer in peers:
                peer.close()
        for peer in peers:
            result["against"][peer.name].update(comparison(peer, checked, folder))
        if HUGGING_FACE in args.against and name not in WITH_HUGGING_FACE:
            result["against"][HUGGING_FACE] = {"note": "Hugging Face has no such model"}
    result.update(inside(ours, workload))
    kind = args.amp or "fp32"
    rate = result["flops"] / result["ours"]["median_ms"] * 1000
    result.update(gflops_per_s=rate / 1e9, share_of_peak=rate / peaks[kind])
    return result


def work(contender: Checkout, workload: Workload) -> Any:
    return contender.train if workload.training else contender.inference


def start_peers(name: str, workload: Workload, args: argparse.Namespace, options: argparse.Namespace,
                spec: Dict[str, Any], ours: Checkout, folder: str) -> List[Peer]:
    """The others of `--against` that can do this work; checkouts get our weights if they fit."""
    if not args.against:
        return []
    batch = {**make_batch(workload.dataset_file, options, len(ours.batch[-1]), size_of(workload, args))}
    torch.save(batch, spec["batch"])
    weights = str(Path(folder) / "weights.pt")
    torch.save(ours.model.state_dict(), weights)
    peers = []
    for number, other in enumerate(args.against):
        if other == HUGGING_FACE and name not in WITH_HUGGING_FACE:
            continue
        mine = {**spec, "work": "train" if workload.training else "inference", "threads": torch.get_num_threads(),
                "outputs": str(Path(folder) / f"outputs{number}.pt")}
        if other == HUGGING_FACE:
            mine.update(kind=HUGGING_FACE, options={key: value for key, value in vars(options).items()
                                                    if isinstance(value, (int, float, str, type(None)))})
        else:
            mine.update(kind="checkout", weights=weights)
        peers.append(Peer(other, mine, Path(folder) / f"log{number}.txt"))
    return peers


def comparison(peer: Peer, checked: Dict[str, Any], folder: str) -> Dict[str, Any]:
    """How a checkout's results on the same batch with the same weights differ from ours."""
    if peer.ready["loss"] is None:
        return {}
    theirs = torch.load(peer.outputs, weights_only=True)
    return {"loss": peer.ready["loss"], "unknown_flags": peer.ready["ignored"],
            **{f"largest_difference_of_{name}": float((theirs[name] - checked[name]).abs().max()) for name in theirs}}


def inside(contender: Checkout, workload: Workload) -> Dict[str, Any]:
    """Of single steps: floating point operations, reads by the host, operators, peak memory, and the parts' times."""
    device = contender.device
    flops, reads, memory = FlopCounterMode(display=False), HostReads(), PeakMemory(device)
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

    work(contender, workload)(turns())
    result = {"flops": flops.get_total_flops(), "host_reads_per_step": sum(reads.reads.values()),
              "host_reads": dict(reads.reads), "operators_per_step": reads.operators, "peak_memory_mb": memory.mb,
              "memory_before_mb": memory.before_mb, "components_ms": median_parts(watch)}
    if events:
        result.update(host_waits_per_step=events["waits"], kernels_per_step=events["kernels"])
    return result


@contextlib.contextmanager
def parts_watched(watch: Stopwatch, contender: Checkout) -> Iterator[None]:
    """Put the stopwatch on the parts of a model and of its training step, for good; on optimizers, in the block."""
    model = contender.model
    watch.watch(model.backbone, "forward", "backbone on images")
    watch.watch(model, "patch_features", "backbone on patches")
    for method in ("forward", "encode", "decode"):
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
