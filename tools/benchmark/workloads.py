"""The trainings and inferences that are timed: their flags, and made-up batches for them."""
import argparse
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

import main
from util import recipes
from util.errors import InputError

OBJECTS = 7  # in an image; COCO's have 7.3 on average
SEED = 0


@dataclass(frozen=True)
class Workload:
    """What a model is trained or used for; `flags` are main.py's, `size` says which of the image sizes applies."""

    title: str
    flags: str
    size: str
    training: bool

    @property
    def at_hugging_face(self) -> bool:
        return self.dataset_file == "coco" or self.dataset_file == "imagenet" and self.training

    @property
    def dataset_file(self) -> str:
        return self.flags.split()[1]


_UPDETR = "--dataset_file imagenet --fre_cnn --feature_recon"
_DETREG = "--dataset_file regions --object_embedding_loss"
_DETR = "--dataset_file coco"
_DEFORMABLE = "--dataset_file coco --model deformable_detr"
WORKLOADS = {
    "updetr_pretrain": Workload("UP-DETR pre-training", _UPDETR, "pretrain", True),
    "detreg_pretrain": Workload("DETReg pre-training", _DETREG, "pretrain", True),
    "detr_finetune": Workload("DETR fine-tuning", _DETR, "finetune", True),
    "deformable_finetune": Workload("Deformable DETR fine-tuning", _DEFORMABLE, "finetune", True),
    "updetr_inference": Workload("UP-DETR inference", _UPDETR, "inference", False),
    "detreg_inference": Workload("DETReg inference", _DETREG, "inference", False),
    "detr_inference": Workload("DETR inference", _DETR, "inference", False),
    "deformable_inference": Workload("Deformable DETR inference", _DEFORMABLE, "inference", False),
}


def model_flags(flags: str, args: argparse.Namespace) -> List[str]:
    """Words for main.py's parser: a workload's flags with those given to the benchmark."""
    words = [*flags.split(), "--load_backbone", "none", "--device", args.device, *args.main_flags]
    words += ["--amp", args.amp] if args.amp else []
    words += [f"--{name}" for name in ("compile", "tf32") if getattr(args, name)]
    return words


def parse_main_flags(words: Sequence[str]) -> argparse.Namespace:
    """main.py's flags, resolved.

    Raises:
        InputError: if main.py wouldn't take them.
    """
    parser = main.get_args_parser()

    def refuse(message: str) -> None:
        raise InputError(f"main.py doesn't take {' '.join(words)}: {message}")

    parser.error = refuse
    return recipes.resolve(parser.parse_args(list(words)))


def make_batch(dataset_file: str, model_args: argparse.Namespace, batch_size: int, size: Sequence[int]) -> Dict[str, Any]:
    """Random images [3, H, W], all of one size, with what is to be found in them.

    Returns:
        `images`, a list; `patches` [B, M, 3, P, P] for UP-DETR, else None; `targets` as `datasets` makes them.
    """
    generator = torch.Generator().manual_seed(SEED)
    images = [torch.randn(3, *size, generator=generator) for _ in range(batch_size)]
    count = {"imagenet": model_args.num_patches, "regions": model_args.max_prop}.get(dataset_file) or OBJECTS
    crops: Optional[Tensor] = None
    if dataset_file in ("imagenet", "regions"):
        crops = torch.randn(batch_size, count, 3, model_args.patch_size, model_args.patch_size, generator=generator)
    targets = [make_target(i, count, size, generator, 1 if dataset_file in ("imagenet", "regions") else 90)
               for i in range(batch_size)]
    if dataset_file == "regions":
        targets = [{**target, "patches": mine} for target, mine in zip(targets, crops)]
    return {"images": images, "patches": crops if dataset_file == "imagenet" else None, "targets": targets}


def make_target(image_id: int, count: int, size: Sequence[int], generator: torch.Generator, num_labels: int
                ) -> Dict[str, Tensor]:
    """So many random objects; labels are 1 … num_labels, boxes lie inside the image."""
    sides = 0.05 + 0.4 * torch.rand(count, 2, generator=generator)
    centres = sides / 2 + (1 - sides) * torch.rand(count, 2, generator=generator)
    return {"image_id": torch.tensor([image_id]), "boxes": torch.cat([centres, sides], 1),
            "labels": torch.randint(1, num_labels + 1, (count,), generator=generator),
            "area": sides.prod(1) * size[0] * size[1], "iscrowd": torch.zeros(count, dtype=torch.int64),
            "orig_size": torch.tensor(list(size)), "size": torch.tensor(list(size))}


def size_of(workload: Workload, args: argparse.Namespace) -> Tuple[int, int]:
    """Height and width of the workload's images."""
    return tuple(getattr(args, f"{workload.size}_size"))
