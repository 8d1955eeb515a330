"""What flags may change about how a model computes: `--tf32`, `--compile` and `--no_fuse`."""
import argparse
import os
import shutil

import torch
from torch import nn

from models import fused
from util.errors import InputError

COMPILERS = ("g++", "clang++", "c++")


def set_precision(args: argparse.Namespace) -> None:
    """Let GPUs round the factors of float32 products to TF32's ten bits with `--tf32`; not without it, in convolutions
    either, where torch would by default.

    Raises:
        InputError: for `--tf32` without a GPU.
    """
    on_gpu = torch.device(args.device).type == "cuda"
    if args.tf32 and not on_gpu:
        raise InputError(f"--tf32 has no effect with --device {args.device}: it is a number format of GPUs")
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        torch.backends.cudnn.allow_tf32 = args.tf32
    fused.enable(not args.no_fuse)


def compile_parts(model: nn.Module, args: argparse.Namespace) -> None:
    """With `--compile`, compile the transformer, and on a GPU the backbone; on a CPU its fused steps are faster.

    Images of all sizes go through one compiled program. Names of parameters stay as they are.

    Raises:
        InputError: where there is no C++ compiler for a CPU's program.
    """
    if not args.compile:
        return
    detector = getattr(model, "detr", model)  # the detector inside a model with a mask head
    parts = [detector.transformer.encoder, detector.transformer.decoder]
    if torch.device(args.device).type == "cuda":
        parts.append(detector.backbone[0].body)
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name):
        raise InputError(f"--compile needs a C++ compiler on a CPU ({', '.join(COMPILERS)}, or the one that CXX names)")
    for part in parts:
        part.compile(dynamic=True)
