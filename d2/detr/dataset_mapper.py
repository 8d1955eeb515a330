"""From a Detectron2 dataset dict to what `Detr` takes."""
from typing import Any, Dict

from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from torch import Tensor

from d2.samples import build_transform, training_target
from datasets.image_io import UnreadableImage, read_image
from util.errors import InputError


class DetrDatasetMapper:
    """Reads an image, and in training its annotations, and transforms both as DETR does (`d2.samples`). Images are turned
    as their EXIF orientation says, as Detectron2's own mapper does (main.py: with --apply_exif alone).

    Args:
        cfg: `INPUT` and `MODEL.MASK_ON` are read.
        is_train: random augmentation and annotations; else one resize.
    """

    def __init__(self, cfg: CfgNode, is_train: bool = True) -> None:
        self.is_train = is_train
        self.with_masks = cfg.MODEL.MASK_ON
        self.channels_reversed = cfg.INPUT.FORMAT == "BGR"
        self.transform = build_transform(cfg.INPUT, is_train)

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Map one image.

        Args:
            dataset_dict: in Detectron2's format: `file_name`, `height`, `width`, and in training `annotations`.

        Returns:
            the dict without its annotations, with `image` uint8 [3, H, W] in the config's channel order, and in
            training `instances` (`gt_boxes`, `gt_classes`, and with masks `gt_masks`). Its randomness is torch's,
            which Detectron2 seeds in each worker.

        Raises:
            InputError: if the image can't be read, is of another size than the dict says, or lacks a mask.
        """
        image = self._read(dataset_dict)
        target = self._target(dataset_dict, *image.shape[1:]) if self.is_train else None
        image, target = self.transform(image, target)
        mapped = {name: value for name, value in dataset_dict.items() if name != "annotations"}
        mapped["image"] = (image.flip(0) if self.channels_reversed else image).contiguous()
        if target is not None:
            instances = Instances(tuple(image.shape[1:]), gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"])
            if self.with_masks:
                instances.gt_masks = BitMasks(target["masks"])
            mapped["instances"] = instances
        return mapped

    def _read(self, dataset_dict: Dict[str, Any]) -> Tensor:
        path = dataset_dict["file_name"]
        try:
            image, (height, width) = read_image(path, apply_exif=True)
        except UnreadableImage as error:
            raise InputError(str(error)) from error
        annotated = dataset_dict.setdefault("height", height), dataset_dict.setdefault("width", width)
        if annotated != (height, width):
            raise InputError(f"image file {path} is {width}x{height} pixels, but its annotations say "
                             f"{annotated[1]}x{annotated[0]}")
        return image

    def _target(self, dataset_dict: Dict[str, Any], height: int, width: int) -> Dict[str, Tensor]:
        source = f"image file {dataset_dict['file_name']}"
        annotations = [item for item in dataset_dict.get("annotations", []) if not item.get("iscrowd", 0)]
        if self.with_masks and any("segmentation" not in item for item in annotations):
            raise InputError(f"{source} has an annotation without segmentation, which MODEL.MASK_ON needs")
        boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in annotations]
        segmentations = [item["segmentation"] for item in annotations] if self.with_masks else None
        classes = [item["category_id"] for item in annotations]
        return training_target(boxes, classes, segmentations, height, width, source)
