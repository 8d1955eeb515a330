"""Write a detector as a program that runs without this code.

`python -m tools.export --checkpoint FILE --format onnx --output detr.onnx`, or `--format torchscript`, or `--format
pt2` (torch.export). The program takes a batch of any number of images, of any height and width above 32,

    images  float32 [B, 3, H, W], RGB, normalised as in training; smaller images padded with zeros, right and below
    mask    bool [B, H, W], True on that padding; all False where there is none

and gives

    pred_logits  float32 [B, N, C + 1], before the softmax; the last class is "no object"
                 (Deformable DETR: [B, N, C], before the sigmoid)
    pred_boxes   float32 [B, N, 4], centre x, centre y, width, height in 0..1 of the image without its padding
    pred_masks   float32 [B, N, h, w], logits over the padded image, from a model with a mask head

What else a user must know (class names, of a panoptic model which are things, sizes to resize to, mean and deviation of
the colours) is stored in the file as JSON under the key "detr". Once written, the file is loaded again and its outputs
are compared with the model's.
"""
import argparse
import io
import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from tools.loading import DETECTOR, Loaded, add_checkpoint_flags, load_model
from tools.output import refuse_others, remember, require_ending, writing
from tools.predict import names_of_classes
from util.errors import InputError, run_program
from util.misc import NestedTensor
from util.ranges import TOOL_RANGES, check_ranges

INFO_KEY = "detr"
# Batches that the written program is tried on, apart from the one that it was traced with: one image and several, two
# sizes, neither of which is a multiple of the backbone's stride.
BATCH_SIZES, IMAGE_SIZES = (1, 3), ((101, 150), (170, 75))
TRACED = (2, 128, 160)
AXES = {"images": {0: "batch", 2: "height", 3: "width"}, "mask": {0: "batch", 1: "height", 2: "width"}}
# Rounding differs between programs, and grows with the depth of the network.
TOLERANCE = 1e-3

Program = Callable[[Tensor, Tensor], Dict[str, Tensor]]


class PlainDetector(nn.Module):
    """A detector that takes plain tensors: images [B, 3, H, W] and their padding, bool [B, H, W]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask: Tensor) -> Dict[str, Tensor]:
        out = self.model(NestedTensor(images, mask))
        if not torch.jit.is_scripting():
            out.pop("enc_outputs", None)  # what a two-stage model's loss compares; its script leaves them out by itself
        return out


def example_batch(batch: int, height: int, width: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Random images [B, 3, H, W] of different sizes, the smaller the later, and their padding [B, H, W]."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randn(batch, 3, height, width, generator=generator)
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for i in range(batch):
        mask[i, height - height * (i + 1) // (2 * batch + 1):] = True
        mask[i, :, width - width * (i + 1) // (2 * batch + 2):] = True
    return images.masked_fill(mask[:, None], 0).to(device), mask.to(device)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


# Formats: how each is written, and how it is loaded again as a function.


def write_torchscript(model: PlainDetector, path: Path, info: str, opset: Optional[int]) -> None:
    """TorchScript, for `torch.jit.load`; runs on any device."""
    # By way of memory, as below: torch's own writer of files ends the process where the disk is full.
    content = io.BytesIO()
    torch.jit.save(torch.jit.script(model), content, _extra_files={INFO_KEY: info})
    path.write_bytes(content.getbuffer())


def read_torchscript(path: Path, device: torch.device) -> Program:
    return torch.jit.load(str(path), map_location=device)


def write_pt2(model: PlainDetector, path: Path, info: str, opset: Optional[int]) -> None:
    """An exported program, for `torch.export.load`; runs on the device that it was exported on.

    Raises:
        InputError: if torch is too old.
    """
    content = io.BytesIO()
    torch.export.save(traced(model, "pt2"), content, extra_files={INFO_KEY: info})
    path.write_bytes(content.getbuffer())


def read_pt2(path: Path, device: torch.device) -> Program:
    return torch.export.load(str(path)).module()


def write_onnx(model: PlainDetector, path: Path, info: str, opset: Optional[int]) -> None:
    """ONNX in one file, through torch's exporter of exported programs.

    Raises:
        InputError: if torch or the packages that it needs are too old or missing.
    """
    require_onnx_packages()
    names = list(model(*example_batch(*TRACED, device_of(model))))
    try:
        program = torch.onnx.export(traced(model, "onnx"), (), input_names=list(AXES), output_names=names, dynamo=True,
                                    dynamic_shapes=AXES, opset_version=opset, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(f"--format onnx: the exporter of torch {torch.__version__} can't write this model "
                         f"({type(error).__name__}); with torch 2.7 and later it can") from error
    except ModuleNotFoundError as error:  # of an onnxscript that doesn't know this torch yet
        raise InputError(f"--format onnx: the installed onnxscript is too old for torch {torch.__version__} ({error}): "
                         "pip install --upgrade onnxscript") from error
    program.model.metadata_props[INFO_KEY] = info
    program.save(str(path), external_data=False)


def read_onnx(path: Path, device: torch.device) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor, mask: Tensor) -> Dict[str, Tensor]:
        outputs = session.run(names, {"images": images.cpu().numpy(), "mask": mask.cpu().numpy()})
        return {name: torch.from_numpy(output).to(device) for name, output in zip(names, outputs)}

    return run


def require_onnx_packages() -> None:
    """Raise InputError unless ONNX files can be written and run."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"--format onnx needs packages that can't be imported ({error}): "
                         "pip install -r requirements/export.txt") from error


def traced(model: PlainDetector, form: str) -> Any:
    """The model as a torch.export program whose batch, height and width are free.

    Raises:
        InputError: if torch is too old.
    """
    if not can_trace():
        raise InputError(f"--format {form} needs torch 2.6 or later, this is {torch.__version__}; "
                         "torchscript works with it")
    # Free without a name: named axes must satisfy every case that torch told apart while tracing for all their values,
    # which it can't prove for sizes halved again and again. The written program is tried on other sizes instead.
    free = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in AXES.items()}
    return torch.export.export(model, example_batch(*TRACED, device_of(model)), dynamic_shapes=free, strict=False)


def can_trace() -> bool:
    """Whether torch.export knows axes that are free without a name."""
    return hasattr(torch.export.Dim, "DYNAMIC")


class Format(NamedTuple):
    """A file format: the ending of its files, and the functions above."""

    ending: str
    write: Callable[[PlainDetector, Path, str, Optional[int]], None]
    read: Callable[[Path, torch.device], Program]


FORMATS = {"onnx": Format(".onnx", write_onnx, read_onnx), "pt2": Format(".pt2", write_pt2, read_pt2),
           "torchscript": Format(".pt", write_torchscript, read_torchscript)}


@torch.no_grad()
def largest_differences(model: PlainDetector, program: Program) -> Dict[str, float]:
    """Run both on batches of every size (`BATCH_SIZES`, `IMAGE_SIZES`), each with padding.

    Returns:
        by output, the largest difference of any number, as a share of the output's largest absolute value where that is
        above 1.

    Raises:
        FloatingPointError: if a difference is above `TOLERANCE`, or one of them gives other outputs or shapes.
    """
    largest: Dict[str, float] = {}
    for batch, (height, width) in itertools.product(BATCH_SIZES, IMAGE_SIZES):
        inputs = example_batch(batch, height, width, device_of(model))
        expected, got = model(*inputs), program(*inputs)
        case = f"a batch of {batch}, {height} x {width} pixels"
        shapes, got_shapes = ({name: tuple(value.shape) for name, value in out.items()} for out in (expected, got))
        if shapes != got_shapes:
            raise FloatingPointError(f"the written program gives {got_shapes} for {case}, the model {shapes}")
        for name, value in expected.items():
            difference = ((got[name] - value).abs().max() / value.abs().max().clamp(min=1)).item()
            if not difference <= TOLERANCE:
                raise FloatingPointError(f"the written program's {name} differ by {difference:.2g} from the model's "
                                         f"for {case}")
            largest[name] = max(difference, largest.get(name, 0.0))
    return largest


def describe(loaded: Loaded) -> str:
    """What a user of the program must know, as JSON."""
    return json.dumps({"class_names": names_of_classes(loaded, None), "is_thing": loaded.is_thing_map, "mean": IMAGENET_MEAN,
                       "std": IMAGENET_STD, "val_size": loaded.args.val_size, "max_size": loaded.args.max_size,
                       "scores": "sigmoid" if loaded.args.model == "deformable_detr" else "softmax"},
                      ensure_ascii=False)


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.export", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, "a trained detector", default_device="cpu")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS))
    parser.add_argument("--output", help="file to write (outputs/detr with the format's ending)")
    parser.add_argument("--opset", type=int, help="ONNX: version of the operator set (the exporter's own)")
    parser.add_argument("--mask_softmax", choices=("joint", "per_head"),
                        help="of a mask model's attention maps, see main.py (as in the training, else joint)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Load, write, load again, compare."""
    check_ranges(args, TOOL_RANGES)
    form = FORMATS[args.format]
    path = Path(args.output or f"outputs/detr{form.ending}")
    require_ending(str(path), [form.ending], "--output")
    if args.opset is not None and args.format != "onnx":
        raise InputError(f"--opset {args.opset} has no effect with --format {args.format}; it belongs to onnx")
    unchecked = path.with_stem(f"{path.stem}.unchecked")
    refuse_others("--output", [path, unchecked])
    loaded = load_model(args.checkpoint, DETECTOR, args.device, nheads=args.nheads, dilation=args.dilation,
                        mask_softmax=args.mask_softmax)
    model = PlainDetector(loaded.model).eval().requires_grad_(False)
    try:
        with writing("--output", str(path)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own exporters; what they write is checked below
            path.parent.mkdir(parents=True, exist_ok=True)
            form.write(model, unchecked, describe(loaded), args.opset)
            program = form.read(unchecked, device_of(model))
        differences = largest_differences(model, program)
        unchecked.replace(path)
        remember([path])
    finally:
        if os.path.exists(unchecked):
            unchecked.unlink()
    print(f"{path}: {path.stat().st_size / 2 ** 20:.1f} MiB; the same outputs as the model for batches of "
          f"{' and '.join(map(str, BATCH_SIZES))}, {' and '.join(f'{h} x {w}' for h, w in IMAGE_SIZES)} pixels, "
          "padding included; largest difference: "
          f"{', '.join(f'{name} {value:.1g}' for name, value in differences.items())}")


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
