"""DETR's optimizer from a Detectron2 config."""
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from util.errors import InputError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """SOLVER.OPTIMIZER over all trained parameters, with SOLVER.BACKBONE_MULTIPLIER on the backbone's rate.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" clips the norm over all parameters together, as DETR does; Detectron2's
    own types, "value" and "norm" (of each parameter), work too.

    Raises:
        InputError: for an optimizer other than ADAMW and SGD.
    """
    solver = cfg.SOLVER
    parameters = get_default_optimizer_params(
        model, base_lr=solver.BASE_LR, weight_decay_norm=solver.WEIGHT_DECAY_NORM, bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lambda name: solver.BACKBONE_MULTIPLIER if "backbone." in name else 1.0)
    if solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(parameters, solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    elif solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(parameters, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV,
                                    weight_decay=solver.WEIGHT_DECAY)
    else:
        raise InputError(f"SOLVER.OPTIMIZER {solver.OPTIMIZER} is not one of ADAMW, SGD")
    if not solver.CLIP_GRADIENTS.ENABLED or solver.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
        return maybe_add_gradient_clipping(cfg, optimizer)

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(everything, solver.CLIP_GRADIENTS.CLIP_VALUE, solver.CLIP_GRADIENTS.NORM_TYPE)

    optimizer.register_step_pre_hook(clip)  # under mixed precision too this comes after the gradients are unscaled
    return optimizer
