"""Which model is in a checkpoint: the flags that its tensors tell, and those that were stored beside them."""
from typing import Any, Dict, Set

from torch import Tensor

from models.backbone import LAYERS
from util.checkpoint import counts_from_centre, detector_of, is_deformable, model_state, stored_flags
from util.errors import InputError

# What tensors don't tell of a model, and with which flags of a pre-training by patches it goes on.
STORED_SHAPE = ("nheads", "dilation", "position_embedding_scale", "mask_softmax")
STORED_PRETEXT = ("num_patches", "query_shuffle", "no_attention_mask")
NEEDED = {True: ("input_proj.0.0.weight", "transformer.decoder.layers.0.linear1.weight"),
          False: ("query_embed.weight", "transformer.decoder.norm.weight", "input_proj.weight")}
# Number of residual blocks in layer1 … layer4, whether they are bottlenecks (three convolutions), and the first two sides
# of the first block's 3×3 weight: wide networks and those with groups differ there.
RESNETS = {"resnet18": ((2, 2, 2, 2), False, (64, 64)), "resnet34": ((3, 4, 6, 3), False, (64, 64)),
           "resnet50": ((3, 4, 6, 3), True, (64, 64)), "resnet101": ((3, 4, 23, 3), True, (64, 64)),
           "resnet152": ((3, 8, 36, 3), True, (64, 64)), "resnext50_32x4d": ((3, 4, 6, 3), True, (128, 4)),
           "resnext101_32x8d": ((3, 4, 23, 3), True, (256, 8)), "resnext101_64x4d": ((3, 4, 23, 3), True, (256, 4)),
           "wide_resnet50_2": ((3, 4, 6, 3), True, (128, 128)), "wide_resnet101_2": ((3, 4, 23, 3), True, (128, 128))}


def model_flags(checkpoint: Dict[str, Any], location: str, nheads: int | None) -> Dict[str, Any]:
    """Flags of the model in a checkpoint, from its tensors and its stored flags; none if it holds no whole detector.

    Args:
        nheads: attention heads, if they are given; else the stored number, or 8.

    Raises:
        InputError: if it holds no weights, or those of a model that can't be built.
    """
    state = model_state(checkpoint, location)
    if any(name not in detector_of(state) for name in NEEDED[is_deformable(state)]):
        return {}
    stored = stored_flags(checkpoint)
    names = STORED_SHAPE + (STORED_PRETEXT if "patch2query.weight" in state else ())
    told = {name: stored[name] for name in names if stored.get(name) is not None}
    told.update(architecture(state, location, nheads or told.get("nheads") or 8))
    if told["position_embedding"] != "sine":
        told.pop("position_embedding_scale", None)
    elif told["model"] == "detr" and counts_from_centre(checkpoint):
        told["position_from_centre"] = True
    if not told.get("masks"):
        told.pop("mask_softmax", None)
    if "num_queries" not in told and stored.get("num_queries"):  # two-stage models keep no queries
        told["num_queries"] = stored["num_queries"]
    return told


def architecture(state: Dict[str, Tensor], location: str, nheads: int = 8) -> Dict[str, Any]:
    """The flags that the tensors of a DETR, with or without masks, UP-DETR or Deformable DETR tell, if it has so many heads.

    Raises:
        InputError: if its backbone is no ResNet that can be built, or the heads don't fit.
    """
    if is_deformable(state):
        return _deformable_architecture(state, location, nheads)
    whole, state = state, detector_of(state)
    num_queries, hidden_dim = state["query_embed.weight"].shape
    told: Dict[str, Any] = {
        "model": "detr", "num_queries": num_queries, "hidden_dim": hidden_dim,
        "dim_feedforward": len(state["transformer.decoder.layers.0.linear1.weight"]),
        "enc_layers": len(_next_parts(state, "transformer.encoder.layers.")),
        "dec_layers": len(_next_parts(state, "transformer.decoder.layers.")),
        "pre_norm": "transformer.encoder.norm.weight" in state,
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        **_backbone(state, location),
    }
    if "patch2query.weight" in state:
        told["feature_recon"] = "feature_align.layers.0.weight" in state
    elif "class_embed.weight" in state:
        told["num_classes"] = len(state["class_embed.weight"]) - 1
    if "mask_head.lay1.weight" in whole:
        # The head's first convolution sees the projected map and an attention map for each head.
        told.update(masks=True, nheads=len(whole["mask_head.lay1.weight"]) - hidden_dim)
    return told


def _deformable_architecture(state: Dict[str, Tensor], location: str, nheads: int) -> Dict[str, Any]:
    num_levels, hidden_dim = state["transformer.level_embed"].shape
    enc_layers, dec_layers = (len(_next_parts(state, f"transformer.{part}.layers.")) for part in ("encoder", "decoder"))
    points = {}
    for flag, name in (("enc_n_points", "encoder.layers.0.self_attn"), ("dec_n_points", "decoder.layers.0.cross_attn")):
        num_weights = len(state[f"transformer.{name}.attention_weights.weight"])
        points[flag], rest = divmod(num_weights, nheads * num_levels)
        if rest:
            raise InputError(f"{location} samples {num_weights} points of {num_levels} feature levels, which "
                             f"{nheads} attention heads can't share; give --nheads")
    told = {
        "model": "deformable_detr", "num_feature_levels": num_levels, "hidden_dim": hidden_dim, "enc_layers": enc_layers,
        "dec_layers": dec_layers, "dim_feedforward": len(state["transformer.decoder.layers.0.linear1.weight"]), **points,
        "two_stage": "transformer.enc_output.weight" in state,
        "with_box_refine": bool(_next_parts(state, "transformer.decoder.bbox_embed.")),
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        **_backbone(state, location),
    }
    if "class_embed.0.weight" in state:
        told["num_classes"] = len(state["class_embed.0.weight"])
    if "query_embed.weight" in state:
        told["num_queries"] = len(state["query_embed.weight"])
    return told


def _backbone(state: Dict[str, Tensor], location: str) -> Dict[str, str]:
    blocks = tuple(len(_next_parts(state, f"backbone.0.body.{layer}.")) for layer in LAYERS)
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    conv2 = state.get("backbone.0.body.layer1.0.conv2.weight")
    found = (bottleneck, None if conv2 is None else tuple(conv2.shape[:2]))
    for name, (whole, *rest) in RESNETS.items():
        if found == tuple(rest) and blocks in (whole, (*whole[:3], 0)):
            return {"backbone": name, "backbone_last_layer": "layer4" if blocks[3] else "layer3"}
    raise InputError(f"{location}: its backbone, with {', '.join(map(str, blocks))} residual blocks, "
                     f"is none of {', '.join(RESNETS)}")


def _next_parts(state: Dict[str, Tensor], prefix: str) -> Set[str]:
    """What follows the prefix, up to the next dot, in the names that begin with it."""
    return {name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)}
