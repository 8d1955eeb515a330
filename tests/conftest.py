"""What several tests need: small models, two images of different sizes with targets, and the originals' facts."""
import argparse
import json
import pathlib
import shutil
from typing import Any, Callable, Dict, Iterator, List

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from main import get_args_parser
from util import recipes

DATA = pathlib.Path(__file__).parent / "data"
ROOT = pathlib.Path(__file__).parent.parent

# Flags of a detector as small as it gets.
TINY = ("--device cpu --dataset_file coco --num_classes 5 --backbone resnet18 --load_backbone none --hidden_dim 32 "
        "--nheads 4 --enc_layers 2 --dec_layers 2 --dim_feedforward 48 --dropout 0 --num_queries 12").split()
TINY_PRETRAINING = [*TINY[:2], "--dataset_file", "imagenet", *TINY[6:], "--num_patches", "3", "--feature_recon"]

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def leaves_no_folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Removes what a module's tests share, gigabytes of checkpoints, at the module's end, unless one of them failed."""
    base, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(base.iterdir())
    yield
    if request.session.testsfailed == failed:
        for made in set(base.iterdir()) - before:
            if not made.is_symlink():  # pytest's own, to the latest
                shutil.rmtree(made)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_args() -> Callable[..., argparse.Namespace]:
    """Resolved flags of a tiny DETR, or UP-DETR pre-training, with the given ones changed."""

    def make(pretraining: bool = False, **changes: Any) -> argparse.Namespace:
        args = get_args_parser().parse_args(TINY_PRETRAINING if pretraining else TINY)
        for name, value in changes.items():
            assert hasattr(args, name), f"no flag --{name}"
            setattr(args, name, value)
        return recipes.resolve(args)

    return make


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The folder of main.py."""
    return ROOT


@pytest.fixture(scope="session")
def published() -> Dict[str, Any]:
    """Keys, shapes, counts and loss names of the published models, measured on the original programs."""
    return json.loads((DATA / "published_models.json").read_text())


@pytest.fixture(scope="session")
def original_flags() -> Dict[str, Dict[str, Any]]:
    """The original programs' command line flags, by program."""
    return json.loads((DATA / "original_flags.json").read_text())


@pytest.fixture
def images() -> List[Tensor]:
    """Two images of different sizes, so that both are padded in a batch."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(3, 64, 96, generator=generator), torch.randn(3, 96, 64, generator=generator)]


@pytest.fixture
def targets() -> List[Dict[str, Tensor]]:
    """Targets of two images: one with two objects, one without any."""
    return [{"image_id": torch.tensor([5]), "labels": torch.tensor([1, 3]),
             "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.7, 0.3, 0.2, 0.4]])},
            {"image_id": torch.tensor([6]), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


class HostReads(TorchDispatchMode):
    """Collects operations whose result's shape or value the host must know: on a GPU the host would wait for them."""

    WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
        if name in self.WAITING or by_mask:
            self.waited.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def host_reads() -> HostReads:
    """A context; its `waited` then names the operations in it that would have waited."""
    return HostReads()
