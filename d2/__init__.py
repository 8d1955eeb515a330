"""This project's detectors inside Detectron2: see README.md. `d2.detr` and train_net need it, the rest doesn't."""
import importlib.util

import util.openmp  # noqa: F401  (before torch)
from util.errors import InputError


class Detectron2Missing(InputError, ImportError):
    """Detectron2 is not installed."""


def require_detectron2() -> None:
    """Raise Detectron2Missing, which says how to get it, unless Detectron2 is installed."""
    if importlib.util.find_spec("detectron2") is None:
        raise Detectron2Missing(
            "Detectron2 is not installed and is not on PyPI: with torch already there, run "
            "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2")
