"""Which defaults belong to which training: the one table in which the published programs' differences are written down."""
import argparse
import math
import os
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

import torch

from util.errors import InputError
from util.parallel import available_cpus
from util.ranges import check_ranges

Default = Union[Any, Callable[[argparse.Namespace], Any]]


def _position_scale(args: argparse.Namespace) -> Optional[float]:
    return 2 * math.pi if args.position_embedding == "sine" else None


# Defaults that all trainings share. They aren't the parser's, so that a flag that is given can be told from one that isn't.
COMMON: Dict[str, Default] = {
    "weight_decay": 1e-4, "start_epoch": 0, "backbone": "resnet50", "backbone_last_layer": "layer4", "dilation": False,
    "position_embedding": "sine", "enc_layers": 6, "dec_layers": 6, "hidden_dim": 256, "nheads": 8,
}
_LABELLED: Dict[str, Default] = {
    "batch_size": 2, "num_workers": 2, "load_backbone": "supervised", "val_size": 800, "max_size": 1333,
    "remove_difficult": False, "group_by_aspect": False, "apply_exif": False,
}
_DETR: Dict[str, Default] = {
    "lr": 1e-4, "lr_backbone_names": ["backbone."], "num_queries": 100, "dim_feedforward": 2048, "pre_norm": False,
    "position_embedding_scale": _position_scale, "set_cost_class": 1.0, "cls_loss_coef": 1.0,
}
_DETR_LABELLED: Dict[str, Default] = {
    **_LABELLED, **_DETR, "epochs": 300, "lr_drop": 200, "lr_backbone": 1e-5, "eos_coef": 0.1, "masks": False,
    "mask_loss_coef": 1.0, "dice_loss_coef": 1.0, "mask_softmax": "joint",
}
_DEFORMABLE: Dict[str, Default] = {
    "lr": 2e-4, "lr_backbone_names": ["backbone.0"], "lr_linear_proj_names": ["reference_points", "sampling_offsets"],
    "lr_linear_proj_mult": 0.1, "num_queries": 300, "dim_feedforward": 1024,
    "position_embedding_scale": _position_scale, "num_feature_levels": 4, "enc_n_points": 4, "dec_n_points": 4,
    "with_box_refine": False, "two_stage": False, "set_cost_class": 2.0, "cls_loss_coef": 2.0, "focal_alpha": 0.25,
}
_DEFORMABLE_LABELLED: Dict[str, Default] = {
    **_LABELLED, **_DEFORMABLE, "epochs": 50, "lr_drop": 40, "lr_backbone": 2e-5,
}
_SUBSETS: Dict[str, Default] = {"filter_pct": -1.0, "filter_num": -1.0, "shots_of": "boxes"}
_REGIONS: Dict[str, Default] = {
    "batch_size": 4, "lr_drop": 40, "num_workers": 16, "load_backbone": "swav", "lr_backbone": 0.0, "strategy": "topk",
    "max_prop": 30, "patch_size": 128, "object_embedding_loss": False, "obj_embedding_head": "intermediate",
    "object_embedding_coef": 1.0, "load_embedding": lambda args: args.load_backbone,
}

# By --model and --dataset_file: the defaults of flags that were not given. A function computes its value from the other
# flags. Values: the published programs of DETR, UP-DETR, Deformable DETR and DETReg; no-match weight M/N: UP-DETR,
# sec. 4.1.
_OF_TRAINING: Dict[Tuple[str, str], Dict[str, Default]] = {
    ("detr", "coco"): {**_DETR_LABELLED, **_SUBSETS},
    ("detr", "coco_panoptic"): _DETR_LABELLED,
    ("detr", "voc"): {**_DETR_LABELLED, **_SUBSETS},
    ("deformable_detr", "coco"): {**_DEFORMABLE_LABELLED, **_SUBSETS},
    ("deformable_detr", "coco_panoptic"): _DEFORMABLE_LABELLED,
    ("deformable_detr", "voc"): {**_DEFORMABLE_LABELLED, **_SUBSETS},
    ("detr", "imagenet"): {
        **_DETR, "batch_size": 2, "epochs": 60, "lr_drop": 40, "num_workers": 16, "load_backbone": "swav",
        "num_patches": 10, "feature_recon": False, "query_shuffle": False, "no_attention_mask": False, "fre_cnn": False,
        "match_within_group": False, "patch_size": 128, "min_patch": 8, "held_out_share": 0.0,
        "lr_backbone": lambda args: 0.0 if args.fre_cnn else args.lr,
        "eos_coef": lambda args: args.num_patches / args.num_queries,
    },
    ("detr", "regions"): {**_DETR, **_REGIONS, "epochs": 60, "eos_coef": 0.1, "position_from_centre": True},
    ("deformable_detr", "regions"): {**_DEFORMABLE, **_REGIONS, "epochs": 50},
}
RECIPES = {training: {**COMMON, **defaults} for training, defaults in _OF_TRAINING.items()}
PARSER_DEFAULTS = {  # of flags whose default is the same in all trainings and never told by a checkpoint
    "clip_max_norm": 0.1, "accumulate_steps": 1, "dropout": 0.1, "set_cost_bbox": 5, "set_cost_giou": 2,
    "bbox_loss_coef": 5, "giou_loss_coef": 2, "aux_loss": True, "seed": 42, "reset_embedding_layer": 1, "eval_every": 1,
    "save_every": 1, "world_size": 1, "dist_timeout": 1800, "dist_url": "env://",
    "output_dir": "", "resume": "", "pretrain": "",
    **{name: False for name in ("sgd", "tf32", "compile", "no_fuse", "random_seed", "eval", "tensorboard")},
}
MODELS = {"detr": "DETR", "deformable_detr": "Deformable DETR"}
DATASETS = {"coco": "COCO-format data", "coco_panoptic": "COCO-format panoptic data", "voc": "Pascal VOC",
            "imagenet": "images without labels", "regions": "regions of images without labels"}
# DETReg's names of trainings: --dataset_file, the flag that says where the images lie, where they do in --data_root.
LAYOUT = {
    "imagenet": ("regions", "imagenet_path", "ilsvrc/train"),
    "imagenet100": ("regions", "imagenet_path", "ilsvrc100/train"),
    "coco_pretrain": ("regions", "imagenet_path", "MSCoco/train2017"), "coco": ("coco", "coco_path", "MSCoco"),
    "voc": ("voc", "voc_path", "pascal/VOCdevkit"),
}
TITLES = {"imagenet": "UP-DETR pre-training", "regions": "DETReg pre-training of {model}"}

BOOKKEEPING = ("resolved", "given")  # attributes of args that `resolve` adds and that are no flags
DATASET_NAMES = {"ImageNet": "imagenet"}  # UP-DETR's program calls it so

# Flags that mean something for some data sets only; giving one elsewhere is refused rather than ignored.
FLAGS_OF = {
    "coco_path": ("coco", "coco_panoptic"), "coco_panoptic_path": ("coco_panoptic",), "voc_path": ("voc",),
    "remove_difficult": ("voc",), "num_classes": ("coco", "coco_panoptic", "voc", "regions"),
    **{name: ("coco", "voc") for name in (
        "filter_pct", "filter_num", "filter_file", "filter_seed", "shots", "shots_of", "class_split", "class_part")},
    **{name: ("coco", "coco_panoptic") for name in (
        "masks", "frozen_weights", "mask_loss_coef", "dice_loss_coef", "mask_softmax")},
    **{name: ("coco", "coco_panoptic") for name in (
        "train_images", "train_annotations", "val_images", "val_annotations")},
    **{name: ("imagenet",) for name in (
        "imagenet_val_path", "held_out_share", "num_patches", "feature_recon", "query_shuffle", "no_attention_mask",
        "fre_cnn", "match_within_group", "min_patch", "max_patch")},
    **{name: ("imagenet", "regions") for name in (
        "imagenet_path", "class_list", "patch_size", "pretrain_sizes", "pretrain_max_size")},
    **{name: ("regions",) for name in (
        "strategy", "max_prop", "cache_path", "object_embedding_loss", "obj_embedding_head", "object_embedding_coef",
        "load_embedding")},
    **{name: ("coco", "coco_panoptic", "voc") for name in ("train_sizes", "val_size", "max_size", "group_by_aspect", "apply_exif")},
    **{name: ("coco", "coco_panoptic", "voc", "regions") for name in ("crop_resize", "crop_size")},
}
# The same for flags that mean something for one model only.
MODEL_OF = {
    **{name: "detr" for name in ("pre_norm", "eos_coef", "masks", "frozen_weights", "position_from_centre")},
    **{name: "deformable_detr" for name in (
        "with_box_refine", "two_stage", "num_feature_levels", "enc_n_points", "dec_n_points", "focal_alpha",
        "lr_linear_proj_names", "lr_linear_proj_mult")},
}
OF_EMBEDDINGS = ("obj_embedding_head", "object_embedding_coef", "load_embedding")  # that need --object_embedding_loss
OF_MASKS = ("frozen_weights", "mask_loss_coef", "dice_loss_coef", "mask_softmax")  # flags that need --masks
# Flags of which one at most can decide what is trained on, and flags that mean nothing without another.
CHOICES = ("filter_pct", "filter_num", "filter_file", "shots")
NEEDS = {"filter_seed": ("filter_pct", "filter_num", "shots"), "shots_of": ("shots",), "class_part": ("class_split",),
         "class_split": ("class_part",)}
# A path that suits several trainings means the last of them; --dataset_file names another.
REQUIRED_PATHS = {"regions": ("imagenet_path",), "coco": ("coco_path",),
                  "coco_panoptic": ("coco_path", "coco_panoptic_path"), "voc": ("voc_path",),
                  "imagenet": ("imagenet_path",)}
# Every flag of main.py with its parser's default.
BLANK: Dict[str, Any] = {
    **{name: None for recipe in RECIPES.values() for name in recipe}, **dict.fromkeys((*FLAGS_OF, *MODEL_OF)),
    **dict.fromkeys(("model", "dataset_file", "dataset", "data_root", "device", "amp", "overfit", "save_every_steps",
                     "lr_drop_epochs", "local_rank")),
    **PARSER_DEFAULTS,
}
# Values that the published parsers give to flags of other trainings too, beside those of all recipes.
UNASKED: Dict[str, Tuple[Any, ...]] = {
    "coco_path": ("./data/coco", ""), "data_root": ("data",), "imagenet_path": ("",),
    "position_embedding_scale": (2 * math.pi,),
}


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in every flag whose default depends on the training or on the machine. Flags that were given stay as they are.

    Does nothing to what is already resolved. Data paths are not required here (see `require_data`). Namespaces of the
    published programs' parsers and of stored trainings are understood, see `_adopt`.

    Raises:
        InputError: if flags contradict each other or don't belong to this training.
    """
    if getattr(args, "resolved", False):
        return args
    adopted = _is_foreign(args)
    if getattr(args, "dataset_file", None) in DATASET_NAMES:
        args.dataset_file = DATASET_NAMES[args.dataset_file]
    if adopted:
        _adopt(args)
    _follow_layout(args)
    args.given = {name: value for name, value in vars(args).items() if value is not None}
    _settle(args)
    if adopted:  # these state every default, so a value counts as given only where it differs
        args.given = {name: value for name, value in args.given.items()
                      if name in BLANK and not _same(value, _default(args, name))}
    return args


def settled(args: Union[argparse.Namespace, Mapping[str, Any]]) -> argparse.Namespace:
    """Resolve flags for a caller from outside, whose own Namespace, or dict of stored flags, stays as it is."""
    if isinstance(args, Mapping):
        args = argparse.Namespace(**args)
    elif _is_foreign(args):
        args = argparse.Namespace(**vars(args))
    return resolve(args)


def is_published_detr(args: Union[argparse.Namespace, Mapping[str, Any]]) -> bool:
    """Tell whether flags are those of DETR's or UP-DETR's program, which know neither a model's name nor feature levels."""
    names = args if isinstance(args, Mapping) else vars(args)
    return "model" not in names and "num_feature_levels" not in names


def _is_foreign(args: argparse.Namespace) -> bool:
    """Tell whether flags come from elsewhere than main.py's command line: some are absent, or none was left open."""
    if getattr(args, "resolved", False):
        return False
    if any(name not in vars(args) for name in BLANK):
        return True
    recipe = RECIPES.get((args.model, args.dataset_file), {})
    return bool(recipe) and all(getattr(args, name) is not None for name in recipe if recipe[name] is not _position_scale)


def _adopt(args: argparse.Namespace) -> None:
    """Read the Namespace of a published program's parser, or of a stored training, as flags of main.py.

    Flags that it lacks are not given. Nor are flags that its training has no use for, where they have the value that a
    parser gives them unasked: `mask_loss_coef=1` without masks. The programs are told by what only they have: UP-DETR's
    pre-training by `num_patches` without `dataset_file`, Deformable DETR by `num_feature_levels` without `model`, DETReg
    by `obj_embedding_head`, UP-DETR's fine-tuning by `pretrain`.
    """
    own = dict(vars(args))
    for name, default in BLANK.items():
        if name not in own:
            setattr(args, name, default)
        elif own[name] is None and default is not None or own[name] == "" and default is None:
            setattr(args, name, default)
    is_detreg = "obj_embedding_head" in own and "load_embedding" not in own  # the latter is ours
    if is_detreg and args.dataset is not None:
        if args.dataset_file == "coco":
            args.dataset_file = None  # its parser says so whatever it trains on
        for flag in ("coco_path", "imagenet_path", "voc_path"):  # its program makes them all of data_root
            path = getattr(args, flag)
            if path and os.path.dirname(os.path.normpath(path)) == os.path.normpath(args.data_root or "data"):
                setattr(args, flag, None)
    if args.dataset_file is None and args.dataset is None and own.get("num_patches") is not None:
        args.dataset_file = "imagenet"
    if args.model is None and own.get("num_feature_levels") is not None:
        args.model = "deformable_detr"
    if str(args.device).startswith("cuda") and not torch.cuda.is_available():
        args.device = None
    _follow_stored_layout(args)
    _drop_unasked(args)
    if is_detreg and args.model == "detr" and args.position_embedding != "learned" and "position_from_centre" not in own:
        args.position_from_centre = True
    if args.masks and args.model != "deformable_detr" and "mask_softmax" not in own and (is_detreg or "pretrain" in own):
        args.mask_softmax = "per_head"


def _follow_stored_layout(args: argparse.Namespace) -> None:
    """Forget `--dataset` and `--data_root` where the flags that they stand for are stored beside them."""
    if args.dataset is None:
        args.data_root = None
    elif args.dataset in LAYOUT:
        dataset_file, flag, _ = LAYOUT[args.dataset]
        if args.dataset_file in (None, dataset_file) and getattr(args, flag):
            args.dataset_file, args.dataset, args.data_root = dataset_file, None, None


def _drop_unasked(args: argparse.Namespace) -> None:
    """Take away values that a parser gave to flags of no use for the training."""
    dataset_file = args.dataset_file or (LAYOUT[args.dataset][0] if args.dataset in LAYOUT else _dataset_of_path(args))
    model = args.model or "detr"
    useless = {name for name, datasets in FLAGS_OF.items() if dataset_file not in datasets}
    useless |= {name for name, owner in MODEL_OF.items() if owner != model}
    useless |= set() if args.masks else set(OF_MASKS)
    useless |= set() if args.object_embedding_loss else set(OF_EMBEDDINGS)
    useless |= {"position_embedding_scale"} if args.position_embedding == "learned" else set()
    useless |= {"lr_drop"} if args.lr_drop_epochs else set()
    useless |= {name for name, others in NEEDS.items() if all(getattr(args, other) in (None, -1) for other in others)}
    for name in useless:
        usual = [recipe[name] for recipe in RECIPES.values() if name in recipe] + list(UNASKED.get(name, ()))
        if any(_same(getattr(args, name), value) for value in usual):
            setattr(args, name, None)
    for name, value in UNASKED.items():
        if "" in value and getattr(args, name) == "":
            setattr(args, name, None)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return list(value) == list(other)
    return value == other


def follow(args: argparse.Namespace, told: Dict[str, Any]) -> None:
    """Resolve flags anew where a checkpoint has told some of them: those that were given count more than these, and these
    more than defaults. Told flags that don't belong to the training are left out."""
    names = {"model", *told, *(name for recipe in RECIPES.values() for name in recipe)}
    model = args.given.get("model") or told.get("model") or args.model
    for name in names:
        belongs = args.dataset_file in FLAGS_OF.get(name, DATASETS) and MODEL_OF.get(name, model) == model
        setattr(args, name, args.given.get(name, told.get(name) if belongs else None))
    _settle(args)


def _settle(args: argparse.Namespace) -> argparse.Namespace:
    if args.dataset_file is None:
        args.dataset_file = _dataset_of_path(args)
    if args.model is None:
        args.model = "deformable_detr" if args.dataset_file == "regions" or _starts_from_deformable(args) else "detr"
    for name, known in (("dataset_file", DATASETS), ("model", MODELS)):
        if getattr(args, name) not in known:
            raise InputError(f"--{name} {getattr(args, name)!r} is not one of {', '.join(known)}")
    _check_belonging(args)
    _check_values(args)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        raise InputError(f"--device {args.device} is not a device; use cuda, cuda:1 or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: this machine has no usable CUDA device; pass --device cpu")
    for name, default in RECIPES[args.model, args.dataset_file].items():
        if getattr(args, name) is None:
            setattr(args, name, default(args) if callable(default) else default)
            if name == "num_workers":
                args.num_workers = min(args.num_workers, available_cpus())
    _check_relations(args)
    args.resolved = True
    return args


def _starts_from_deformable(args: argparse.Namespace) -> bool:
    """Guess, before the checkpoint is read that will tell it, that it is a Deformable DETR's: a flag of these is given."""
    start = args.resume or args.pretrain
    return bool(start) and any(model == "deformable_detr" and getattr(args, name) is not None
                               for name, model in MODEL_OF.items())


def _follow_layout(args: argparse.Namespace) -> None:
    """Let `--dataset` and `--data_root` say what other flags say, as in DETReg's program. A path that is given wins."""
    if args.dataset is None:
        if args.data_root is not None:
            raise InputError(f"--data_root {args.data_root} has no effect without --dataset, which says what of it to "
                             "use")
        return
    if args.dataset not in LAYOUT:
        raise InputError(f"--dataset {args.dataset!r} is not one of {', '.join(LAYOUT)}")
    dataset_file, flag, place = LAYOUT[args.dataset]
    if args.dataset_file not in (None, dataset_file):
        raise InputError(f"--dataset {args.dataset} means --dataset_file {dataset_file}, not {args.dataset_file}")
    args.dataset_file = dataset_file
    if getattr(args, flag) is None:
        setattr(args, flag, f"{args.data_root or 'data'}/{place}")
    elif args.data_root is not None:
        raise InputError(f"--data_root {args.data_root} has no effect with --{flag}, which says where the images are")


def _dataset_of_path(args: argparse.Namespace) -> str:
    given = [name for name, paths in REQUIRED_PATHS.items() if getattr(args, paths[-1])]
    return given[-1] if given else "coco"


def _is_given(args: argparse.Namespace, name: str) -> bool:
    """Tell whether a flag asks for something. A switch that is off doesn't, as in the flags that a training stored."""
    value = getattr(args, name)
    return value is not None and value is not False


def _check_belonging(args: argparse.Namespace) -> None:
    for name, datasets in FLAGS_OF.items():
        if _is_given(args, name) and args.dataset_file not in datasets:
            raise InputError(f"--{name} has no effect with --dataset_file {args.dataset_file}; "
                             f"it belongs to {' and '.join(datasets)}")
    for name, model in MODEL_OF.items():
        if _is_given(args, name) and args.model != model:
            raise InputError(f"--{name} is for --model {model} only, not for {args.model}")
    if (args.model, args.dataset_file) not in RECIPES:
        raise InputError(f"--model {args.model} has no training on {DATASETS[args.dataset_file]} "
                         f"(--dataset_file {args.dataset_file})")


def _check_values(args: argparse.Namespace) -> None:
    check_ranges(args)
    if args.position_embedding_scale is not None and args.position_embedding == "learned":
        raise InputError("--position_embedding_scale has no effect without --position_embedding sine")
    for name in OF_MASKS:
        if getattr(args, name) is not None and not args.masks:
            raise InputError(f"--{name} has no effect without --masks")
    for name in OF_EMBEDDINGS:
        if getattr(args, name) is not None and not args.object_embedding_loss:
            raise InputError(f"--{name} has no effect without --object_embedding_loss")
    if not args.reset_embedding_layer and not args.pretrain:
        raise InputError("--reset_embedding_layer 0 has no effect without --pretrain, whose class heads it keeps")
    if args.position_from_centre and args.position_embedding == "learned":
        raise InputError("--position_from_centre has no effect without --position_embedding sine")
    if args.frozen_weights and args.pretrain:
        raise InputError(f"--pretrain {args.pretrain} has no effect with --frozen_weights, which fills the detector")
    if args.tensorboard and (args.eval or not args.output_dir):
        raise InputError("--tensorboard writes down a training in --output_dir; "
                         + ("--eval doesn't train" if args.eval else "that flag is missing"))
    if args.save_every_steps and (args.eval or not args.output_dir):
        raise InputError("--save_every_steps saves a training in --output_dir; "
                         + ("--eval doesn't train" if args.eval else "that flag is missing"))
    if args.lr_drop_epochs and args.lr_drop is not None:
        raise InputError(f"--lr_drop {args.lr_drop} has no effect with --lr_drop_epochs")
    given = [name for name in CHOICES if getattr(args, name) not in (None, -1)]
    if len(given) > 1:
        raise InputError(f"--{given[1]} has no effect with --{given[0]}, which says what to train on")
    for name, others in NEEDS.items():
        if getattr(args, name) is not None and all(getattr(args, other) in (None, -1) for other in others):
            raise InputError(f"--{name} has no effect without --{' or --'.join(others)}")
    if args.dataset_file == "regions" and (args.eval or args.overfit):
        raise InputError(f"--{'eval' if args.eval else 'overfit'} has no effect with --dataset_file regions: there is "
                         "nothing to evaluate on")
    if args.fre_cnn and args.lr_backbone:
        raise InputError(f"--lr_backbone {args.lr_backbone} would train the backbone that --fre_cnn freezes")


def _check_relations(args: argparse.Namespace) -> None:
    """Raise InputError for numbers that are in their ranges but don't suit each other."""
    multiple = 4 if args.position_embedding == "sine" else 2  # both axes have half of it, in sines and cosines
    if args.hidden_dim % multiple or args.hidden_dim % args.nheads:
        raise InputError(f"--hidden_dim {args.hidden_dim} must be a multiple of {multiple} and of --nheads {args.nheads}")
    if args.model == "deformable_detr" and args.hidden_dim % 32:
        raise InputError(f"--hidden_dim {args.hidden_dim} must be a multiple of 32 for --model deformable_detr")
    if args.crop_size and not (len(args.crop_size) == 2 and args.crop_size[0] <= args.crop_size[1]):
        raise InputError(f"--crop_size {' '.join(map(str, args.crop_size))} is not a smallest and a largest side")
    if args.max_patch is not None and args.max_patch < (args.min_patch or 0):
        raise InputError(f"--max_patch {args.max_patch} is less than --min_patch {args.min_patch}")
    if args.start_epoch and args.epochs is not None and args.start_epoch > args.epochs:
        raise InputError(f"--start_epoch {args.start_epoch} is after the last of --epochs {args.epochs}")
    costs = ("set_cost_class", "set_cost_bbox", "set_cost_giou")
    if all(getattr(args, name) == 0 for name in costs):
        raise InputError(f"--{', --'.join(costs)} are all 0: nothing would tell which query is to find which object")


def require_data(args: argparse.Namespace) -> None:
    """Raise InputError unless the flags that say where the data set lies were given."""
    if args.train_annotations or args.val_annotations:
        return  # files named one by one: the data sets say what else they need
    for flag in REQUIRED_PATHS[args.dataset_file]:
        if not getattr(args, flag):
            raise InputError(f"--{flag} is missing: where is the data set? (--coco_path, --voc_path, or "
                             "--imagenet_path for pre-training)")


def describe(args: argparse.Namespace) -> str:
    """The training's name, the flags that differ from their defaults, and all with their values, for the start of the log."""
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in BOOKKEEPING}
    training = TITLES.get(args.dataset_file, "{model} on {data}").format(model=MODELS[args.model],
                                                                        data=DATASETS[args.dataset_file])
    changed = {name: value for name, value in flags.items()
               if (name in args.given or name in RECIPES[args.model, args.dataset_file] and name != "num_workers")
               and value != _default(args, name)
               and not (value in ("", False) and _default(args, name) is None)}
    return "\n".join([training, "differing from the defaults: " + (_pairs(changed) or "nothing"), _pairs(flags)])


def _default(args: argparse.Namespace, name: str) -> Any:
    default = RECIPES[args.model, args.dataset_file].get(name, PARSER_DEFAULTS.get(name))
    return default(args) if callable(default) else default


def _pairs(flags: Dict[str, Any]) -> str:
    return "  ".join(f"{name}={value}" for name, value in flags.items())
