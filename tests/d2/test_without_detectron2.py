"""How an import of the wrapper ends where Detectron2 is missing."""
import importlib.util
import subprocess
import sys

import pytest

from commands import ROOT

WITHOUT = "import sys; sys.modules['detectron2'] = None; "  # what Python itself does to a module that can't be imported


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python in the project's root."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, timeout=60)


def test_an_import_without_detectron2_ends_in_one_sentence_that_says_how_to_get_it() -> None:
    done = python("-c", WITHOUT + "from d2.detr import Detr")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "d2.Detectron2Missing: Detectron2 is not installed and is not on PyPI: with torch already there, run "
        "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2")
    caught = python("-c", WITHOUT + "\ntry:\n    import d2.detr\nexcept ImportError:\n    print('caught')")
    assert caught.stdout == "caught\n"


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is not None, reason="Detectron2 is installed")
def test_train_net_without_detectron2_ends_in_one_line() -> None:
    done = python("d2/train_net.py", "--eval-only")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: Detectron2 is not installed")
