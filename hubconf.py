"""Entry points of `torch.hub.load`: detectors at their published sizes, with published weights if asked for.

    torch.hub.load("path/to/this/folder", "detr_resnet50", source="local", pretrained=True)

Models take a NestedTensor, a tensor [B, 3, H, W] or a list of tensors [3, Hi, Wi], normalised RGB. They come in
training mode, as modules do in torch: call `eval()` before predicting.
"""
# torch.hub takes every callable without a leading underscore for an entry point: modules are imported here, not names.
import typing

import torch

import models
import models.backbone
import models.detr
import models.position_encoding
import models.segmentation
import models.transformer
import models.updetr
import util.checkpoint
import util.errors

dependencies = ["torch", "torchvision", "scipy"]


class _Published(typing.NamedTuple):
    """What tells a published model from the others, and the file of its weights."""

    backbone: str
    dilation: bool
    weights: str
    num_classes: int = 91


_PUBLISHED = {
    "detr_resnet50": _Published("resnet50", False, "detr-r50-e632da11.pth"),
    "detr_resnet50_dc5": _Published("resnet50", True, "detr-r50-dc5-f0fb7ef5.pth"),
    "detr_resnet101": _Published("resnet101", False, "detr-r101-2c7b67e5.pth"),
    "detr_resnet101_dc5": _Published("resnet101", True, "detr-r101-dc5-a2e86def.pth"),
    "detr_resnet50_panoptic": _Published("resnet50", False, "detr-r50-panoptic-00ce5173.pth", 250),
    "detr_resnet50_dc5_panoptic": _Published("resnet50", True, "detr-r50-dc5-panoptic-da08f1b1.pth", 250),
    "detr_resnet101_panoptic": _Published("resnet101", False, "detr-r101-panoptic-40021d53.pth", 250),
}
_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/detr/"  # the digits in a file's name begin its SHA-256, which is checked
_NUM_QUERIES = 100

_Module = torch.nn.Module
_Built = typing.Union[_Module, typing.Tuple[_Module, _Module]]
_Weights = typing.Union[bool, str]


def detr_resnet50(pretrained: _Weights = False, num_classes: int = 91, return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-50: 42.0 AP on COCO's validation images (paper, table 1).

    Args:
        pretrained: True for the published weights, which are downloaded once into torch.hub's cache, or the file or
            URL of a checkpoint.
        num_classes: highest label + 1; the published weights have 91.
        return_postprocessor: also return what turns outputs into scores, labels and boxes.

    Returns:
        the model, or (model, `PostProcess`).

    Raises:
        InputError (a ValueError): if the weights can't be had or don't fit.
    """
    return _detector("detr_resnet50", pretrained, num_classes, return_postprocessor)


def detr_resnet50_dc5(pretrained: _Weights = False, num_classes: int = 91,
                      return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-50 at stride 16 (DC5): 43.3 AP on COCO (table 1). Arguments as of `detr_resnet50`."""
    return _detector("detr_resnet50_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet101(pretrained: _Weights = False, num_classes: int = 91, return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-101: 43.5 AP on COCO (table 1). Arguments as of `detr_resnet50`."""
    return _detector("detr_resnet101", pretrained, num_classes, return_postprocessor)


def detr_resnet101_dc5(pretrained: _Weights = False, num_classes: int = 91,
                       return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-101 at stride 16 (DC5): 44.9 AP on COCO (table 1). Arguments as of `detr_resnet50`."""
    return _detector("detr_resnet101_dc5", pretrained, num_classes, return_postprocessor)


def detr_resnet50_panoptic(pretrained: _Weights = False, num_classes: int = 250, threshold: float = 0.85,
                           return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-50 and a mask head: 43.4 PQ on COCO panoptic (paper, table 5).

    Args:
        pretrained, num_classes: as of `detr_resnet50`; the published weights have 250 classes.
        threshold: least score of a segment, for the post-processor.
        return_postprocessor: also return what makes a panoptic map of the outputs, with COCO's things and stuff.

    Returns:
        the model, or (model, `PostProcessPanoptic`).
    """
    return _panoptic("detr_resnet50_panoptic", pretrained, num_classes, threshold, return_postprocessor)


def detr_resnet50_dc5_panoptic(pretrained: _Weights = False, num_classes: int = 250, threshold: float = 0.85,
                               return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-50 at stride 16 (DC5) and a mask head: 44.6 PQ (table 5). As `detr_resnet50_panoptic`."""
    return _panoptic("detr_resnet50_dc5_panoptic", pretrained, num_classes, threshold, return_postprocessor)


def detr_resnet101_panoptic(pretrained: _Weights = False, num_classes: int = 250, threshold: float = 0.85,
                            return_postprocessor: bool = False) -> _Built:
    """DETR with ResNet-101 and a mask head: 45.1 PQ (table 5). Arguments as of `detr_resnet50_panoptic`."""
    return _panoptic("detr_resnet101_panoptic", pretrained, num_classes, threshold, return_postprocessor)


def updetr_resnet50(checkpoint: str = "", num_classes: typing.Optional[int] = None,
                    return_postprocessor: bool = False) -> _Built:
    """A DETR that was fine-tuned from an UP-DETR pre-training: pre-norm, ResNet-50.

    Args:
        checkpoint: file or URL; without one the weights are random.
        num_classes: highest label + 1; the checkpoint's own, or 91 without one.
        return_postprocessor: also return what turns outputs into scores, labels and boxes.

    Returns:
        the model, or (model, `PostProcess`).

    Raises:
        InputError (a ValueError): if the checkpoint can't be had or holds something else.
    """
    weights = _read(checkpoint, "checkpoint=")
    state = util.checkpoint.model_state(weights, checkpoint) if weights else {}
    if "patch2query.weight" in state:
        raise util.errors.InputError(f"checkpoint={checkpoint} holds an UP-DETR pre-training model: load it with "
                                     "updetr_resnet50_pretraining, or fine-tune it first with main.py --pretrain")
    if num_classes is None:
        num_classes = len(state["class_embed.weight"]) - 1 if "class_embed.weight" in state else 91
    joiner, transformer = _parts("resnet50", pre_norm=True, from_centre=util.checkpoint.counts_from_centre(weights))
    model = models.detr.DETR(joiner, transformer, num_classes, _NUM_QUERIES)
    _fill(model, weights, checkpoint)
    return (model, models.detr.PostProcess()) if return_postprocessor else model


def updetr_resnet50_pretraining(checkpoint: str = "", num_patches: typing.Optional[int] = None) -> _Module:
    """UP-DETR as it is pre-trained, which finds patches in images: ResNet-50, forward(images, patches [B, M, 3, P, P]).

    Args:
        checkpoint: file or URL; without one the weights are random.
        num_patches: the most patches that an image is asked for at once; what the checkpoint was trained with, or 10.
    """
    weights = _read(checkpoint, "checkpoint=")
    flags = util.checkpoint.stored_flags(weights)
    state = util.checkpoint.model_state(weights, checkpoint) if weights else {}
    joiner, transformer = _parts("resnet50", pre_norm=True)
    model = models.updetr.UPDETR(joiner, transformer, num_queries=_NUM_QUERIES,
                                 num_patches=num_patches or flags.get("num_patches") or 10,
                                 feature_recon=not state or "feature_align.layers.0.weight" in state)
    _fill(model, weights, checkpoint)
    return model


def _detector(name: str, pretrained: _Weights, num_classes: int, return_postprocessor: bool) -> _Built:
    published = _PUBLISHED[name]
    joiner, transformer = _parts(published.backbone, published.dilation)
    model = models.detr.DETR(joiner, transformer, num_classes, _NUM_QUERIES)
    _fill_pretrained(model, name, pretrained, num_classes)
    return (model, models.detr.PostProcess()) if return_postprocessor else model


def _panoptic(name: str, pretrained: _Weights, num_classes: int, threshold: float,
              return_postprocessor: bool) -> _Built:
    published = _PUBLISHED[name]
    joiner, transformer = _parts(published.backbone, published.dilation, all_maps=True)
    model = models.segmentation.DETRsegm(models.detr.DETR(joiner, transformer, num_classes, _NUM_QUERIES))
    _fill_pretrained(model, name, pretrained, num_classes)
    if not return_postprocessor:
        return model
    return model, models.segmentation.PostProcessPanoptic(models.coco_is_thing_map(num_classes), threshold=threshold)


def _parts(backbone_name: str, dilation: bool = False, pre_norm: bool = False, all_maps: bool = False,
           from_centre: bool = False) -> typing.Tuple[_Module, _Module]:
    """Backbone with position encoding, and transformer, at the published sizes; `all_maps` for a mask head."""
    backbone = models.backbone.Backbone(backbone_name, train_backbone=True, return_interm_layers=all_maps,
                                        dilation=dilation)
    transformer = models.transformer.Transformer(d_model=256, normalize_before=pre_norm, return_intermediate_dec=True)
    positions = models.position_encoding.PositionEmbeddingSine(transformer.d_model // 2, normalize=True,
                                                               from_centre=from_centre)
    return models.backbone.Joiner(backbone, positions), transformer


def _fill_pretrained(model: _Module, name: str, pretrained: _Weights, num_classes: int) -> None:
    published = _PUBLISHED[name]
    if pretrained is True and num_classes != published.num_classes:
        raise util.errors.InputError(f"num_classes={num_classes}: the published {name} has {published.num_classes} "
                                     "classes; to train it on others, start main.py with --pretrain "
                                     f"{_WEIGHTS_URL}{published.weights}")
    location = _WEIGHTS_URL + published.weights if pretrained is True else pretrained or ""
    _fill(model, _read(location, "pretrained="), location)


def _read(location: str, argument: str) -> typing.Dict[str, typing.Any]:
    """The checkpoint at a file or URL; empty for no location."""
    return util.checkpoint.load_checkpoint(location, flag=argument) if location else {}


def _fill(model: _Module, checkpoint: typing.Dict[str, typing.Any], location: str) -> None:
    if checkpoint:
        util.checkpoint.load_model_strictly(model, checkpoint, location)
