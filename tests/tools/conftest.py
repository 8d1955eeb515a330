"""Checkpoints of tiny models, images to show them, and a way to run a program as its command line would."""
import argparse
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import pytest
import torch
from PIL import Image

from main import build_optimizer
from models import build_model
from util.errors import run_program
from util.schedule import DropAfterEpochs
from util.training_state import TrainingState

NAMES = {1: "disc", 2: "square", 3: "triangle", 4: "star"}


@pytest.fixture
def save_model(tiny_args: Callable[..., argparse.Namespace], tmp_path: Path) -> Callable[..., Path]:
    """Write the checkpoint of a random tiny model as training would; returns its path."""

    def save(name: str, pretraining: bool = False, class_names: Optional[Dict[int, str]] = None,
             **changes: Any) -> Path:
        args = tiny_args(pretraining, **changes)
        args.output_dir = str(tmp_path)
        torch.manual_seed(3)
        model = build_model(args)[0]
        optimizer = build_optimizer(model, args)
        state = TrainingState(model, optimizer, DropAfterEpochs(optimizer, [1]),
                              torch.amp.GradScaler("cpu", enabled=False), class_names or {})
        state.save(args, 0, [name])
        return tmp_path / name

    return save


@pytest.fixture
def detector(save_model: Callable[..., Path]) -> Path:
    """Checkpoint of a tiny DETR that was evaluated on small images."""
    return save_model("detector.pth", class_names=NAMES, val_size=64, max_size=80)


@pytest.fixture
def pretrained(save_model: Callable[..., Path]) -> Path:
    """Checkpoint of a tiny UP-DETR for three patches of 32 pixels."""
    return save_model("pretrained.pth", pretraining=True, patch_size=32, pretrain_sizes=[48, 64], pretrain_max_size=96)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a wide JPEG, and a tall PNG in a folder below."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    for name, size in (("wide.jpg", (100, 60)), ("below/tall.png", (50, 90))):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    return folder


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a tool with command line words; returns what it printed, or its error line where a status is expected."""

    def run(tool: Any, words: List[Any], status: int = 0) -> str:
        capsys.readouterr()
        args = tool.get_args_parser().parse_args([str(word) for word in words])
        if not status:
            run_program(lambda: tool.main(args))
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            run_program(lambda: tool.main(args))
        assert stopped.value.code == status
        return capsys.readouterr().err

    return run
