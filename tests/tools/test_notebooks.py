"""The notebooks run from top to bottom, offline, on what the demo leaves; git holds them without their outputs."""
import json
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import pytest
from PIL import Image

from commands import ROOT

# How many pictures each makes, and something that it prints.
EXPECTED = {"detr_attention": (10, "of 6 places"), "updetr_query_patches": (3, "own patches 0.")}
NOTEBOOKS = sorted(EXPECTED)


@pytest.fixture
def demo(save_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder laid out as the demo's, with tiny models and 28 images."""
    folder = tmp_path / "demo"
    images = folder / "toy" / "coco" / "val2017"
    images.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for number in range(28):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(images / f"{number:02}.jpg")
    for name, saved in (("pretrained", save_model("a.pth", class_names={1: "disc"}, val_size=64)),
                        ("pretrain", save_model("b.pth", pretraining=True, patch_size=32, pretrain_sizes=[64],
                                                pretrain_max_size=96))):
        (folder / name).mkdir()
        saved.rename(folder / name / "checkpoint.pth")
    return folder


def cells(name: str) -> List[Dict[str, Any]]:
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("DEMO_DIR", str(demo))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for proxy in ("http_proxy", "https_proxy"):  # nothing may be fetched
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3",
                            resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert (len(pictures), EXPECTED[name][1] in text) == (EXPECTED[name][0], True), text
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs(name: str) -> None:
    for cell in cells(name):
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert cells(name)[0]["source"][0].startswith("# ")
