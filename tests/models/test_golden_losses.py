"""Every training's first ten losses in float64 are those that are kept, whatever was made faster or tidier since."""
import json
import pathlib

import pytest

from tests.models import golden

KEPT = json.loads((pathlib.Path(__file__).parent.parent / "data" / "golden_losses.json").read_text())


def test_all_kinds_are_kept():
    assert list(KEPT) == list(golden.KINDS)
    assert all(len(steps) == golden.STEPS for steps in KEPT.values())


@pytest.mark.parametrize("kind", golden.KINDS)
def test_the_first_losses_are_the_kept_ones(kind):
    for step, (found, kept) in enumerate(zip(golden.losses_of(kind), KEPT[kind], strict=True)):
        assert found == pytest.approx(kept, rel=1e-12, abs=1e-12), f"in step {step}"
