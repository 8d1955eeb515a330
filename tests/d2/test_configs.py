"""The configs hold only names that exist and do what their headers say."""
import ast
from typing import Any, Dict

import pytest

from commands import ROOT
from d2 import defaults

yaml = pytest.importorskip("yaml", reason="PyYAML comes with Detectron2 and with transformers")
CONFIGS = sorted((ROOT / "d2" / "configs").glob("*.yaml"))
COCO_TRAIN_IMAGES = 118287


def merged(base: Dict[str, Any], changes: Dict[str, Any]) -> Dict[str, Any]:
    """`base` with `changes`, node by node."""
    both = {name: merged(base[name], value) if isinstance(value, dict) and name in base else value
            for name, value in changes.items()}
    return {**base, **both}


def read(path: Any) -> Dict[str, Any]:
    """A config with what it is based on; tuples are strings in YAML, which Detectron2 evaluates."""
    content = yaml.safe_load(path.read_text())
    base = content.pop("_BASE_", None)
    return merged(read(path.parent / base), content) if base else content


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_own_names_exist_and_its_values_have_the_defaults_types(path: Any) -> None:
    config = read(path)
    for name, value in config["MODEL"]["DETR"].items():
        assert type(value) is type(defaults.DETR[name])
    for name, value in defaults.SOLVER.items():
        assert type(config["SOLVER"][name]) is type(value)
    assert config["MODEL"]["META_ARCHITECTURE"] == "Detr" and config["INPUT"]["FORMAT"] == "RGB"


@pytest.mark.parametrize("name, epochs, drop, masks", [("detr_256_6_6_torchvision", 300, 200, False),
                                                       ("detr_segm_256_6_6_torchvision", 25, 15, True)])
def test_schedules(name: str, epochs: int, drop: int, masks: bool) -> None:
    config = read(ROOT / "d2" / "configs" / f"{name}.yaml")
    steps = COCO_TRAIN_IMAGES // config["SOLVER"]["IMS_PER_BATCH"]
    solver, model = config["SOLVER"], config["MODEL"]
    assert solver["MAX_ITER"] == epochs * steps and ast.literal_eval(solver["STEPS"]) == (drop * steps,)
    assert solver["CHECKPOINT_PERIOD"] % steps == 0 == config["TEST"]["EVAL_PERIOD"] % steps
    assert model["MASK_ON"] is masks and len(model["RESNETS"]["OUT_FEATURES"]) == (4 if masks else 1)


def test_the_mask_config_changes_nothing_else() -> None:
    box, masks = (read(path) for path in CONFIGS)
    assert {name for name in box if box[name] != masks[name]} == {"MODEL", "SOLVER", "TEST"}
    assert box["MODEL"]["DETR"] == masks["MODEL"]["DETR"] and masks["MODEL"]["WEIGHTS"] == ""
