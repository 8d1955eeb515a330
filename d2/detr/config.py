"""The configuration nodes of DETR."""
from detectron2.config import CfgNode

from d2 import defaults


def add_detr_config(cfg: CfgNode) -> None:
    """Add `MODEL.DETR.*`, `SOLVER.OPTIMIZER` and `SOLVER.BACKBONE_MULTIPLIER` to a Detectron2 config, in place."""
    cfg.MODEL.DETR = CfgNode(dict(defaults.DETR))
    for name, value in defaults.SOLVER.items():
        cfg.SOLVER[name] = value
