"""The configuration names that this wrapper adds to Detectron2's, with their defaults: those of `main.py`."""
from typing import Any, Dict

# MODEL.DETR.*; in brackets the flag of main.py.
DETR: Dict[str, Any] = {
    "NUM_CLASSES": 80,          # categories of the data set (not its highest id)
    "FROZEN_WEIGHTS": "",       # with MODEL.MASK_ON: checkpoint of a box model, kept as it is [--frozen_weights]
    "GIOU_WEIGHT": 2.0,         # in the loss and in the matching [--giou_loss_coef, --set_cost_giou]
    "L1_WEIGHT": 5.0,           # likewise [--bbox_loss_coef, --set_cost_bbox]
    "DEEP_SUPERVISION": True,   # losses of the earlier decoder layers too [not --no_aux_loss]
    "NO_OBJECT_WEIGHT": 0.1,    # [--eos_coef]
    "MASK_WEIGHT": 1.0,         # [--mask_loss_coef]
    "DICE_WEIGHT": 1.0,         # [--dice_loss_coef]
    "MASK_SOFTMAX": "joint",    # per_head for UP-DETR's mask models [--mask_softmax]
    "NHEADS": 8,                # [--nheads]
    "DROPOUT": 0.1,             # [--dropout]
    "DIM_FEEDFORWARD": 2048,    # [--dim_feedforward]
    "ENC_LAYERS": 6,            # [--enc_layers]
    "DEC_LAYERS": 6,            # [--dec_layers]
    "PRE_NORM": False,          # [--pre_norm]
    "POSITION_FROM_CENTRE": False,  # of what DETReg pre-trained [--position_from_centre]
    "HIDDEN_DIM": 256,          # [--hidden_dim]
    "NUM_OBJECT_QUERIES": 100,  # [--num_queries]
}

# SOLVER.*
SOLVER: Dict[str, Any] = {
    "OPTIMIZER": "ADAMW",       # or SGD
    "BACKBONE_MULTIPLIER": 0.1,  # the backbone's learning rate is this times BASE_LR [--lr_backbone / --lr]
}
