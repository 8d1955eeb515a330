"""DETR as a Detectron2 meta-architecture: `add_detr_config(cfg)`, `DetrDatasetMapper(cfg, is_train)`, `Detr(cfg)`."""
from d2 import require_detectron2

require_detectron2()

from d2.detr.config import add_detr_config  # noqa: E402  (one sentence comes before Detectron2's own import error)
from d2.detr.dataset_mapper import DetrDatasetMapper  # noqa: E402
from d2.detr.detr import Detr  # noqa: E402

__all__ = ["Detr", "DetrDatasetMapper", "add_detr_config"]
