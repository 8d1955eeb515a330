"""The table at the end of the demo."""
from typing import List

from tools.demo import table


def figures(ap: float, ap50: float) -> List[float]:
    return [ap, ap50] + [0.0] * 10


SCRATCH = {5: figures(0.002, 0), 10: figures(0.01, 0.04), 15: figures(0.02, 0.06)}
UPDETR = {5: figures(0.003, 0.01), 10: figures(0.02, 0.06)}


def test_two_trainings() -> None:
    """Epochs that both were evaluated after; no ratio to nothing."""
    assert table({"scratch": SCRATCH, "UP-DETR": UPDETR}) == [
        " epoch | scratch AP   AP50 | UP-DETR AP   AP50 | AP50 ratio",
        "     5 |        0.2    0.0 |        0.3    1.0 |          -",
        "    10 |        1.0    4.0 |        2.0    6.0 |       1.50"]


def test_three_trainings() -> None:
    assert table({"scratch": SCRATCH, "UP-DETR": UPDETR, "DETReg": {10: figures(0.03, 0.1)}}) == [
        " epoch | scratch AP   AP50 | UP-DETR AP   AP50 |  DETReg AP   AP50 | UP-DETR ratio | DETReg ratio",
        "    10 |        1.0    4.0 |        2.0    6.0 |        3.0   10.0 |          1.50 |         2.50"]
