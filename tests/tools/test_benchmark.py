"""tools.benchmark: what it counts, whom it compares with, what it writes. Nothing here depends on how fast anything is."""
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from PIL import Image

from tools.benchmark import __main__ as program
from tools.benchmark.__main__ import GROUPS, PARTS
from tools.benchmark.contender import Losses, Samples
from tools.benchmark.counting import Flops, HostReads, Stopwatch
from tools.benchmark.data_start import write_annotations
from tools.benchmark.hugging_face import HuggingFaceLosses
from tools.benchmark.machine import matrix_product_peak
from tools.benchmark.padding import shown_sizes
from tools.benchmark.photographs import write_photographs
from tools.benchmark.rounds import LEAST_REPEATS, OURS, Rounds, spread
from tools.benchmark.scoring import losses_spec
from tools.benchmark.torchvision_samples import TorchvisionSamples
from tools.benchmark.workloads import parse_main_flags
from util.errors import run_program

ROOT = Path(__file__).parents[2]

SMALL = ("--device cpu --threads 1 --seconds 0 --train_batch 2 --pretrain_size 96 96 --finetune_size 96 128 "
         "--inference_size 96 96 --photo_size 96 128 --eval_images 3").split()
MODEL = ("-- --backbone resnet18 --hidden_dim 32 --nheads 4 --dim_feedforward 32 --enc_layers 1 --dec_layers 2 "
         "--num_queries 20").split()
TIMES = {"median_ms", "quartiles_ms", "images_per_s", "repeats"}
# Another project's checkout: an interface like the original programs', and nothing of ours.
FOREIGN = {
    "main.py": """
import argparse
def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dataset_file", default="coco")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--num_queries", default=100, type=int)
    return parser
""",
    "models/__init__.py": """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, queries):
        super().__init__()
        self.backbone, self.queries = nn.Linear(3, 5), queries
    def forward(self, samples):
        pooled = self.backbone(samples.tensors.mean((2, 3)))[:, None].expand(-1, self.queries, -1)
        return {"pred_logits": pooled, "pred_boxes": pooled[..., :4].sigmoid()}
class Criterion(nn.Module):
    weight_dict = {"loss": 2.0}
    def forward(self, outputs, targets):
        return {"loss": outputs["pred_boxes"].sum() + len(targets[0]["labels"]), "unweighted": torch.ones(())}
class PostProcess(nn.Module):
    def forward(self, outputs, sizes):
        return outputs["pred_boxes"] * sizes.repeat(1, 2)[:, None]
def build_model(args):
    print("a line that must not disturb")
    return Net(args.num_queries), Criterion(), {"bbox": PostProcess()}
""",
    "util/__init__.py": "",
    "util/misc.py": """
import torch
class Nested:
    def __init__(self, tensors):
        self.tensors = tensors
    def to(self, device):
        return Nested(self.tensors.to(device))
def nested_tensor_from_tensor_list(images):
    return Nested(torch.stack(images))
"""}


def refused(words: List[Any], capsys: pytest.CaptureFixture) -> str:
    """The one line that the program ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_program(lambda: program.main(program.get_args_parser().parse_args([str(word) for word in words])))
    assert stopped.value.code == 2
    error, = (line for line in capsys.readouterr().err.splitlines() if "No CUDA runtime" not in line)  # torch's own
    return error


def measured(tmp_path: Path, *words: Any) -> Dict[str, Any]:
    """What the program writes; the last of the words is a list that comes after all others."""
    words = [*SMALL, *words[:-1], "--output", tmp_path / "figures.json", *words[-1]]
    program.main(program.get_args_parser().parse_args([str(word) for word in words]))
    return json.loads((tmp_path / "figures.json").read_text())


def write_foreign(root: Path, **changed: str) -> Path:
    for name, text in {**FOREIGN, **changed}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_training_step_against_this_checkout_and_hugging_face(tmp_path: Path) -> None:
    figures = measured(tmp_path, "--parts", "detr_finetune", "--against", ".", "hf", "--plot", tmp_path / "figures.png", MODEL)
    assert {"cpu", "threads", "torch", "date", "matrix_product_gflops_per_s"} <= set(figures["machine"])
    part = figures["parts"]["detr_finetune"]
    assert part["images"] == 2 and part["size"] == [96, 128]
    assert set(part["against"]) == {".", "hf"}
    for contender in (part["ours"], *part["against"].values()):
        assert TIMES <= set(contender) and contender["repeats"] >= LEAST_REPEATS
        low, high = contender["quartiles_ms"]
        assert 0 < low <= contender["median_ms"] <= high
    same = part["against"]["."]
    assert same["ratio"] == pytest.approx(same["median_ms"] / part["ours"]["median_ms"])
    assert same["loss"] == part["loss"] and "unknown_flags" not in same
    assert same["largest_difference_of_pred_logits"] == same["largest_difference_of_pred_boxes"] == 0
    assert {"backbone on images", "transformer", "heads", "criterion", "backward", "optimizer"} <= set(part["components_ms"])
    assert part["host_reads_per_step"] == 1 and part["host_reads"] == {"cpu": 1}  # the matching
    assert part["operators_per_step"] > 100 and part["peak_memory_mb"] > 0
    assert part["share_of_peak"] == pytest.approx(
        part["gflops_per_s"] / figures["machine"]["matrix_product_gflops_per_s"]["fp32"])
    assert Image.open(tmp_path / "figures.png").width > 500


def test_parts_of_pre_trainings(tmp_path: Path) -> None:
    chosen = ["updetr_pretrain", "detreg_inference"]
    parts = measured(tmp_path, "--parts", *chosen, [*MODEL, "--patch_size", "16"])["parts"]
    assert list(parts) == chosen
    assert "backbone on patches" in parts["updetr_pretrain"]["components_ms"]
    assert parts["updetr_pretrain"]["host_reads"] == {"cpu": 1}
    assert parts["detreg_inference"]["host_reads_per_step"] == 0


def test_parts_on_labelled_images(tmp_path: Path) -> None:
    chosen = ["deformable_inference", "voc_sample", "losses_16", "evaluation", "coco_loader"]
    small = ["--num_workers", "1", "--train_sizes", "64", "--max_size", "96", "--crop_resize", "64", "--crop_size", "48", "64"]
    parts = measured(tmp_path, "--parts", *chosen, [*MODEL, *small])["parts"]
    assert list(parts) == chosen and set(chosen) < set(PARTS)
    assert parts["losses_16"]["host_reads"] == {"cpu": 1}
    assert 0 <= parts["coco_loader"]["data_wait_share"] < 1 and parts["coco_loader"]["workers"] == 1
    assert all(TIMES <= set(parts[name]["ours"]) for name in chosen[:-1])


def test_pre_training_against_hugging_faces_parts(tmp_path: Path) -> None:
    part = measured(tmp_path, "--parts", "updetr_pretrain", "updetr_inference", "--against", "hf",
                    [*MODEL, "--patch_size", "16"])["parts"]
    assert part["updetr_pretrain"]["against"]["hf"]["ratio"] > 0
    assert part["updetr_inference"]["against"]["hf"] == {"note": "hf has no such thing"}


def test_padding_of_made_up_images_and_of_a_data_set(tmp_path: Path) -> None:
    padding = measured(tmp_path, "--parts", "padding", MODEL)["parts"]["padding"]["padding"]
    assert list(padding) == ["2", "4", "8", "16"]
    assert all(0 < shares["share_grouped"] < shares["share"] < 1 for shares in padding.values())
    assert padding["2"]["share"] < padding["4"]["share"] < padding["16"]["share"]
    write_photographs(tmp_path, 17, (96, 128))
    part = measured(tmp_path, "--parts", "padding", [*MODEL, "--coco_path", tmp_path / "coco"])["parts"]["padding"]
    assert part["title"] == "padding of batches of 17 images"


def test_padding_counts_sizes_after_augmentation() -> None:
    options = parse_main_flags("--dataset_file coco --train_sizes 50 --crop_resize 50 --crop_size 80 80".split())
    shown = shown_sizes(torch.tensor([[100, 200]] * 8 + [[200, 100]] * 8), options)
    assert {tuple(size) for size in shown[:8].tolist()} == {(50, 100), (50, 80)}  # resized, or cropped in between
    assert {tuple(size) for size in shown[8:].tolist()} == {(100, 50), (80, 50)}


def test_samples_against_torchvision(tmp_path: Path) -> None:
    chosen = ["updetr_sample", "voc_sample"]
    parts = measured(tmp_path, "--parts", *chosen, "--against", "torchvision", MODEL)["parts"]
    assert parts["updetr_sample"]["against"]["torchvision"]["ratio"] > 0
    assert parts["voc_sample"]["against"]["torchvision"] == {"note": "torchvision has no such thing"}


@pytest.mark.parametrize("flags", [
    "--dataset_file imagenet --imagenet_path {}/unlabelled --patch_size 32 --pretrain_sizes 64",
    "--dataset_file coco --coco_path {}/coco --train_sizes 96 --crop_resize 72 --crop_size 48 64"])
def test_torchvisions_samples_are_like_ours(flags: str, tmp_path: Path) -> None:
    write_photographs(tmp_path, 2, (96, 128))
    spec = {"flags": [*flags.format(tmp_path).split(), "--device", "cpu", "--load_backbone", "none"], "seed": 0}
    for ours, theirs in zip(Samples(spec).dataset[0], TorchvisionSamples(spec).dataset[0]):
        if isinstance(ours, dict):
            assert theirs["boxes"].min() >= 0 and theirs["boxes"].max() <= 1
            assert len(theirs["boxes"]) == len(theirs["labels"]) > 0
        else:
            assert ours.dtype == theirs.dtype and ours.dim() == theirs.dim()
            assert min(ours.shape[-2:]) == min(theirs.shape[-2:])
            assert theirs.mean().abs() < 1 and 0.1 < theirs.std() < 2


def test_groups_name_parts_once() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(PARTS) == sorted(set(PARTS))


def test_losses_equal_hugging_faces() -> None:
    args = program.get_args_parser().parse_args([*SMALL, *MODEL])
    spec, options = losses_spec(16, args)
    theirs = HuggingFaceLosses({**spec, "options": vars(options)})
    assert theirs.check()["loss"] == pytest.approx(Losses(spec).check()["loss"], rel=1e-5)


def test_a_foreign_checkout_is_asked_for_its_documented_interface_only(tmp_path: Path) -> None:
    foreign = write_foreign(tmp_path / "foreign")
    part = measured(tmp_path, "--parts", "detr_finetune", "--against", foreign, MODEL)["parts"]["detr_finetune"]
    figures = part["against"][str(foreign)]
    assert TIMES <= set(figures) and figures["repeats"] == part["ours"]["repeats"]
    assert figures["comparable"] is False and "loss" not in figures  # our weights aren't its model's
    assert {"--hidden_dim", "--load_backbone"} <= set(figures["unknown_flags"])
    assert not {"--backbone", "--num_queries"} & set(figures["unknown_flags"])


def test_a_checkout_that_fails_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = FOREIGN["models/__init__.py"].replace('print("a line that must not disturb")', 'raise KeyError("no weights")')
    foreign = write_foreign(tmp_path / "foreign", **{"models/__init__.py": broken})
    error = refused([*SMALL, "--parts", "detr_inference", "--against", foreign, *MODEL], capsys)
    assert error == f"error: --against {foreign} failed: KeyError: 'no weights'"


def test_growth_measures_a_point_in_a_process_of_its_own(tmp_path: Path) -> None:
    growth = measured(tmp_path, "--growth", "queries", "--values", 10, "--plot", tmp_path / "growth.png",
                      MODEL[:-2])["growth"]["queries"]
    point, = growth["points"]
    assert point["value"] == 10 and point["peak_memory_mb"] > 0 and TIMES <= set(point)
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_growth_of_data(tmp_path: Path) -> None:
    point, = measured(tmp_path, "--growth", "data", "--values", 200, [])["growth"]["data"]["points"]
    assert point["value"] == 200 and point["start_s_boxes"] > 0 and point["start_s_masks"] > 0
    write_annotations(tmp_path / "some.json", 1000)
    content = json.loads((tmp_path / "some.json").read_text())
    assert len(content["images"]) == 1000 and len(content["annotations"]) == 7300


@pytest.mark.parametrize("words, sentence", [
    (["--parts", "speed"], "--parts speed is not one of training, inference"),
    (["--seconds", "-1"], "--seconds -1.0 must be at least 0"),
    (["--train_batch", "0"], "--train_batch 0 must be at least 1"),
    (["--finetune_size", "640", "8"], "--finetune_size 640 8: each side must be at least 96"),
    (["--against", "nowhere"], "--against nowhere is neither hf nor torchvision nor a folder with a main.py"),
    (["--output", "figures.txt"], "--output figures.txt: the name must end in one of .json"),
    (["--values", "3"], "--values needs --growth with one axis"),
    (["--parts", "losses_16", "--", "--layers", "3"], "unrecognized arguments: --layers 3")])
def test_wrong_input_is_told_in_a_sentence(words: List[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    error = refused(words, capsys)
    assert error.startswith("error: ") and sentence in error


def test_host_reads_finds_what_waits() -> None:
    values = torch.arange(6.0).requires_grad_()
    with HostReads() as reads:
        total = (values * 2).sum()
        total.backward()
    assert not reads.reads and reads.operators > 3
    with HostReads() as reads:
        total = (values * 2).sum()
        total.detach().item()
        float(total.detach())
        if total > 3:
            values[values > 2].sum()
        values.detach().nonzero()
    assert reads.reads == Counter(item=1, __float__=1, __bool__=1, index=1, nonzero=1)


def test_host_reads_counts_one_for_a_copy_and_what_is_done_with_it() -> None:
    costs = torch.rand(4, 5)
    with HostReads() as reads:
        host = costs.cpu()
        rows = [part.numpy() for part in host.split(2)]
        host.tolist(), host.sum().item(), costs.to(torch.device("cpu"))
    assert reads.reads == Counter(cpu=1) and len(rows) == 2


def test_host_reads_leaves_optimizers_out() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    with HostReads() as reads:
        optimizer.step()
        layer.bias.sum().item()
    assert reads.reads == Counter(item=1)


def test_flops_of_known_products() -> None:
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    image = torch.ones(2, 3, 8, 8)
    with Flops() as flops:
        product = a @ b
    assert flops.total == 2 * 3 * 5 * 7
    with Flops() as flops:
        product.sum().backward()
    assert flops.total == 2 * 3 * 5 * 7  # the gradient of a alone
    with Flops() as flops:
        torch.nn.functional.conv2d(image, torch.ones(4, 3, 3, 3))
    assert flops.total == 2 * 2 * 4 * 6 * 6 * 3 * 3 * 3


def test_rounds_take_turns() -> None:
    order = []

    def other() -> float:
        order.append("other")
        return 0.5

    rounds = Rounds(0, torch.device("cpu"), {"other": other})
    for _ in rounds:
        order.append("ours")
    assert order[::2] == ["ours"] * len(order[::2]) and order[1::2] == ["other"] * len(order[::2])
    assert len(rounds.times[OURS]) == len(rounds.times["other"]) == LEAST_REPEATS
    result = rounds.results(4)
    assert result["against"]["other"]["images_per_s"] == pytest.approx(8)
    assert result["against"]["other"]["ratio"] == pytest.approx(500 / result["ours"]["median_ms"])


def test_spread_by_hand() -> None:
    figures = spread([0.004, 0.001, 0.003, 0.002, 0.005], 6)
    assert figures.pop("quartiles_ms") == pytest.approx([2, 4])
    assert figures == pytest.approx({"median_ms": 3, "images_per_s": 2000, "repeats": 5})


def test_stopwatch_counts_time_once() -> None:
    class Part:
        def inner(self) -> None:
            pass

        def outer(self) -> None:
            self.inner()

    part, watch = Part(), Stopwatch(torch.device("cpu"))
    watch.watch(part, "inner", "inner")
    watch.watch(part, "outer", "outer")
    watch.watch(part, "missing", "missing")
    watch.step()
    part.outer()
    watch.swap("after")
    watch.step()
    assert set(watch.steps[0]) == {"other", "outer", "inner", "after"}
    assert all(seconds >= 0 for seconds in watch.steps[0].values())


def test_peak_memory_sees_what_is_freed_again() -> None:
    code = """import torch
from tools.benchmark.machine import PeakMemory
with PeakMemory(torch.device("cpu")) as memory:
    torch.ones(2 ** 26)  # 256 MB
print(memory.mb - memory.before_mb)"""
    # In a process of its own: this one may have enough memory left over from other tests.
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert 200 < float(printed) < 400


def test_matrix_product_peak_is_positive() -> None:
    assert matrix_product_peak(torch.device("cpu"), torch.float32) > 1e8


def test_photographs_are_as_large_as_real_ones(tmp_path: Path) -> None:
    write_photographs(tmp_path, 18, (480, 640))
    files = sorted((tmp_path / "coco/train2017").iterdir())
    assert len(files) == 18 and files[0].read_bytes() == files[16].read_bytes() != files[1].read_bytes()
    assert Image.open(files[0]).size == (640, 480)
    assert 50e3 < files[0].stat().st_size < 200e3


def test_flops_of_onednns_fused_convolution_are_those_of_a_convolution() -> None:
    fused = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if fused is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    image, kernel = torch.ones(2, 3, 8, 8), torch.ones(4, 3, 3, 3)
    with Flops() as flops:
        fused(image, kernel, None, [0, 0], [1, 1], [1, 1], 1, "relu", [], "")
        fused(image, torch.ones(2, 4, 6, 6), kernel, None, [0, 0], [1, 1], [1, 1], 1, "add", None, None, [], None)
    assert flops.total == 2 * (2 * 2 * 4 * 6 * 6 * 3 * 3 * 3)
