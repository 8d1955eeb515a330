"""Defaults of every training, refusal of flags that mean nothing in it, and the originals' command lines."""
import argparse

import pytest

from main import get_args_parser
from util import recipes
from util.errors import InputError


def parse(*flags):
    parser = argparse.ArgumentParser(parents=[get_args_parser()], allow_abbrev=False)
    return parser.parse_args([str(flag) for flag in flags])


def resolved(*flags):
    return recipes.resolve(parse("--device", "cpu", *flags))


# Resolving.


@pytest.mark.parametrize("flags, dataset", [((), "coco"), (("--coco_path", "x"), "coco"), (("--voc_path", "x"), "voc"),
                                            (("--imagenet_path", "x"), "imagenet"), (("--dataset_file", "voc"), "voc"),
                                            (("--coco_path", "x", "--coco_panoptic_path", "y"), "coco_panoptic")])
def test_the_path_tells_the_training(flags, dataset):
    assert resolved(*flags).dataset_file == dataset


LABELLED = dict(epochs=300, lr_drop=200, lr=1e-4, lr_backbone=1e-5, eos_coef=0.1, weight_decay=1e-4, clip_max_norm=0.1,
                load_backbone="supervised", num_queries=100, bbox_loss_coef=5, giou_loss_coef=2, masks=False,
                mask_loss_coef=1, dice_loss_coef=1, mask_softmax="joint")
PRETRAINING = dict(epochs=60, lr_drop=40, lr=1e-4, lr_backbone=1e-4, eos_coef=0.1, load_backbone="swav", num_patches=10,
                   num_queries=100, feature_recon=False, fre_cnn=False, query_shuffle=False, match_within_group=False,
                   no_attention_mask=False, patch_size=128, min_patch=8)


DEFORMABLE = dict(epochs=50, lr_drop=40, lr=2e-4, lr_backbone=2e-5, num_queries=300, dim_feedforward=1024, set_cost_class=2,
                  cls_loss_coef=2, focal_alpha=0.25, num_feature_levels=4, enc_n_points=4, dec_n_points=4, two_stage=False,
                  with_box_refine=False, lr_linear_proj_mult=0.1, load_backbone="supervised", masks=None, eos_coef=None)


@pytest.mark.parametrize("dataset, expected", [("coco", LABELLED), ("coco_panoptic", LABELLED), ("voc", LABELLED),
                                               ("imagenet", PRETRAINING)])
def test_published_defaults(dataset, expected):
    args = resolved("--dataset_file", dataset)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("dataset", ["coco", "coco_panoptic", "voc"])
def test_published_defaults_of_deformable_detr(dataset):
    args = resolved("--model", "deformable_detr", "--dataset_file", dataset)
    assert {name: getattr(args, name) for name in DEFORMABLE} == DEFORMABLE


@pytest.mark.parametrize("dataset", ["coco", "coco_panoptic", "voc"])
def test_flags_of_pre_training_stay_unset_elsewhere(dataset):
    args = resolved("--dataset_file", dataset)
    names = ("num_patches", "feature_recon", "fre_cnn", "patch_size", "imagenet_path")
    assert all(getattr(args, name) is None for name in names)


@pytest.mark.parametrize("flags, weight", [
    (("--num_patches", 10), 0.1), (("--num_patches", 5, "--num_queries", 20), 0.25), (("--num_patches", 1), 0.01),
    (("--num_patches", 5, "--eos_coef", 0.3), 0.3)])
def test_no_match_weight_is_patches_over_queries(flags, weight):
    assert resolved("--dataset_file", "imagenet", *flags).eos_coef == pytest.approx(weight)


def test_backbone_rate_of_a_pre_training():
    assert resolved("--dataset_file", "imagenet", "--lr", 2e-4).lr_backbone == 2e-4
    assert resolved("--dataset_file", "imagenet", "--fre_cnn").lr_backbone == 0
    assert resolved("--dataset_file", "imagenet", "--fre_cnn", "--lr_backbone", 0).lr_backbone == 0
    with pytest.raises(InputError, match="^--lr_backbone 0.0001 would train the backbone that --fre_cnn freezes$"):
        resolved("--dataset_file", "imagenet", "--fre_cnn", "--lr_backbone", 1e-4)


def test_what_is_given_stays():
    given = {"epochs": 7, "lr_drop": 5, "lr_backbone": 0.0, "eos_coef": 0.0, "num_workers": 99, "load_backbone": "none"}
    for model, dataset in recipes.RECIPES:
        values = {name: value for name, value in given.items() if recipes.MODEL_OF.get(name, model) == model}
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        args = resolved("--model", model, "--dataset_file", dataset, *flags)
        assert {name: getattr(args, name) for name in values} == values


def test_default_workers_are_at_most_one_per_cpu(monkeypatch):
    for cpus, labelled, pretraining in ((64, 2, 16), (4, 2, 4), (1, 1, 1)):
        monkeypatch.setattr(recipes, "available_cpus", lambda: cpus)
        assert resolved().num_workers == labelled
        assert resolved("--dataset_file", "imagenet").num_workers == pretraining


@pytest.mark.parametrize("flags",
                         [(), ("--dataset_file", "imagenet", "--fre_cnn"), ("--voc_path", "x", "--remove_difficult")])
def test_resolving_twice_changes_nothing(flags):
    args = resolved(*flags)
    before = dict(vars(args))
    assert vars(recipes.resolve(args)) == before


@pytest.mark.parametrize("dataset, flags, message", [
    ("coco", ("--num_patches", 5), "--num_patches has no effect with --dataset_file coco; it belongs to imagenet"),
    ("coco", ("--feature_recon",), "--feature_recon has no effect with --dataset_file coco; it belongs to imagenet"),
    ("voc", ("--imagenet_path", "x"),
     "--imagenet_path has no effect with --dataset_file voc; it belongs to imagenet and regions"),
    ("coco", ("--remove_difficult",), "--remove_difficult has no effect with --dataset_file coco; it belongs to voc"),
    ("voc", ("--train_images", "x"),
     "--train_images has no effect with --dataset_file voc; it belongs to coco and coco_panoptic"),
    ("imagenet", ("--coco_path", "x"), "--coco_path has no effect with --dataset_file imagenet; it belongs to coco and "
     "coco_panoptic"),
    ("imagenet", ("--num_classes", 3),
     "--num_classes has no effect with --dataset_file imagenet; it belongs to coco and coco_panoptic and voc and "
     "regions"),
    ("coco", ("--coco_panoptic_path", "x"),
     "--coco_panoptic_path has no effect with --dataset_file coco; it belongs to coco_panoptic"),
    ("voc", ("--masks",), "--masks has no effect with --dataset_file voc; it belongs to coco and coco_panoptic"),
    ("imagenet", ("--dice_loss_coef", 1),
     "--dice_loss_coef has no effect with --dataset_file imagenet; it belongs to coco and coco_panoptic")])
def test_a_flag_of_another_training_is_refused(dataset, flags, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        resolved("--dataset_file", dataset, *flags)


@pytest.mark.parametrize("flags, message", [
    (("--filter_pct", 1, "--filter_num", 5),
     "--filter_num has no effect with --filter_pct, which says what to train on"),
    (("--filter_file", "x", "--shots", 5), "--shots has no effect with --filter_file, which says what to train on"),
    (("--filter_seed", 1), "--filter_seed has no effect without --filter_pct or --filter_num or --shots"),
    (("--filter_seed", -1, "--shots", 1), "--filter_seed -1 must be at least 0"),
    (("--filter_seed", 1, "--filter_pct", -1),
     "--filter_seed has no effect without --filter_pct or --filter_num or --shots"),
    (("--shots_of", "images"), "--shots_of has no effect without --shots"),
    (("--class_split", "x"), "--class_split has no effect without --class_part"),
    (("--class_part", "base"), "--class_part has no effect without --class_split"),
    (("--shots", 0), "--shots 0 must be at least 1"),
    (("--dataset_file", "coco_panoptic", "--filter_pct", 1),
     "--filter_pct has no effect with --dataset_file coco_panoptic; it belongs to coco and voc"),
    (("--imagenet_path", "x", "--strategy", "topk"),
     "--strategy has no effect with --dataset_file imagenet; it belongs to regions"),
    (("--dataset_file", "regions", "--num_patches", 10),
     "--num_patches has no effect with --dataset_file regions; it belongs to imagenet"),
    (("--dataset_file", "regions", "--max_prop", 0), "--max_prop 0 must be at least 1"),
    (("--dataset_file", "regions", "--eval"),
     "--eval has no effect with --dataset_file regions: there is nothing to evaluate on"),
    (("--dataset_file", "regions", "--overfit", 2),
     "--overfit has no effect with --dataset_file regions: there is nothing to evaluate on")])
def test_flags_of_regions_and_subsets_that_mean_nothing(flags, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        resolved(*flags)


def test_flags_of_regions_and_subsets():
    args = resolved("--dataset_file", "regions", "--imagenet_path", "images")
    assert (args.strategy, args.max_prop, args.cache_path, args.patch_size) == ("topk", 30, None, 128)
    assert args.lr_backbone == 0
    recipes.require_data(args)
    for name in ("coco", "voc"):
        args = resolved("--dataset_file", name)
        assert (args.filter_pct, args.filter_num, args.filter_seed, args.shots_of) == (-1, -1, None, "boxes")
        assert resolved("--dataset_file", name, "--filter_pct", -1).filter_pct == -1


REGIONS = dict(lr_drop=40, lr_backbone=0, load_backbone="swav", load_embedding="swav", object_embedding_loss=False,
               obj_embedding_head="intermediate", object_embedding_coef=1, strategy="topk", max_prop=30, batch_size=4)


@pytest.mark.parametrize("model, expected", [
    ("deformable_detr", dict(**REGIONS, epochs=50, lr=2e-4, num_queries=300, cls_loss_coef=2,
                             position_from_centre=None)),
    ("detr", dict(**REGIONS, epochs=60, lr=1e-4, num_queries=100, cls_loss_coef=1, eos_coef=0.1,
                  position_from_centre=True))])
def test_published_defaults_of_detreg(model, expected):
    args = resolved("--model", model, "--dataset_file", "regions")
    assert {name: getattr(args, name) for name in expected} == expected
    assert resolved("--dataset_file", "regions").model == "deformable_detr" and resolved().model == "detr"
    assert resolved("--dataset_file", "regions", "--load_backbone", "a.pth").load_embedding == "a.pth"


@pytest.mark.parametrize("dataset, dataset_file, flag, path", [
    ("imagenet", "regions", "imagenet_path", "data/ilsvrc/train"),
    ("imagenet100", "regions", "imagenet_path", "data/ilsvrc100/train"),
    ("coco_pretrain", "regions", "imagenet_path", "data/MSCoco/train2017"),
    ("coco", "coco", "coco_path", "data/MSCoco"), ("voc", "voc", "voc_path", "data/pascal/VOCdevkit")])
def test_detregs_names_of_data(dataset, dataset_file, flag, path):
    args = resolved("--dataset", dataset)
    assert (args.dataset_file, getattr(args, flag)) == (dataset_file, path)
    assert getattr(resolved("--dataset", dataset, "--data_root", "/here"), flag) == path.replace("data", "/here", 1)
    assert getattr(resolved("--dataset", dataset, f"--{flag}", "there"), flag) == "there"
    recipes.require_data(args)
    with pytest.raises(InputError, match=f"^--data_root /here has no effect with --{flag}, which says where the "):
        resolved("--dataset", dataset, "--data_root", "/here", f"--{flag}", "there")


@pytest.mark.parametrize("flags, message", [
    (("--data_root", "x"), "--data_root x has no effect without --dataset, which says what of it to use"),
    (("--dataset", "imagenet", "--dataset_file", "coco"),
     "--dataset imagenet means --dataset_file regions, not coco"),
    (("--dataset_file", "regions", "--obj_embedding_head", "head"),
     "--obj_embedding_head has no effect without --object_embedding_loss"),
    (("--dataset_file", "regions", "--load_embedding", "swav"),
     "--load_embedding has no effect without --object_embedding_loss"),
    (("--dataset_file", "coco", "--object_embedding_loss"),
     "--object_embedding_loss has no effect with --dataset_file coco; it belongs to regions"),
    (("--reset_embedding_layer", 0),
     "--reset_embedding_layer 0 has no effect without --pretrain, whose class heads it keeps"),
    (("--position_from_centre", "--position_embedding", "learned"),
     "--position_from_centre has no effect without --position_embedding sine"),
    (("--model", "deformable_detr", "--position_from_centre"),
     "--position_from_centre is for --model detr only, not for deformable_detr"),
    (("--num_workers", -1), "--num_workers -1 must be at least 0"),
    (("--save_every", 0), "--save_every 0 must be at least 1")])
def test_flags_of_detreg_that_mean_nothing(flags, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        resolved(*flags)


@pytest.mark.parametrize("flags", [("--frozen_weights", "x.pth"), ("--mask_loss_coef", 1), ("--dice_loss_coef", 2),
                                   ("--mask_softmax", "per_head")])
def test_flags_of_masks_need_masks(flags):
    with pytest.raises(InputError, match=f"^{flags[0]} has no effect without --masks$"):
        resolved(*flags)
    assert getattr(resolved("--masks", *flags), flags[0][2:]) == flags[1]


@pytest.mark.parametrize("model, flags, message", [
    ("deformable_detr", ("--masks",), "--masks is for --model detr only, not for deformable_detr"),
    ("deformable_detr", ("--frozen_weights", "x.pth"),
     "--frozen_weights is for --model detr only, not for deformable_detr"),
    ("deformable_detr", ("--dice_loss_coef", 1), "--dice_loss_coef has no effect without --masks"),
    ("deformable_detr", ("--pre_norm",), "--pre_norm is for --model detr only, not for deformable_detr"),
    ("deformable_detr", ("--eos_coef", 0.1), "--eos_coef is for --model detr only, not for deformable_detr"),
    ("detr", ("--two_stage",), "--two_stage is for --model deformable_detr only, not for detr"),
    ("detr", ("--lr_linear_proj_mult", 1), "--lr_linear_proj_mult is for --model deformable_detr only, not for detr"),
    ("deformable_detr", ("--num_feature_levels", 0), "--num_feature_levels 0 must be at least 1"),
    ("deformable_detr", ("--hidden_dim", 48),
     "--hidden_dim 48 must be a multiple of 32 for --model deformable_detr"),
    ("deformable_detr", ("--dataset_file", "imagenet"),
     r"--model deformable_detr has no training on images without labels \(--dataset_file imagenet\)")])
def test_a_flag_of_another_model_is_refused(model, flags, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        resolved("--model", model, *flags)


def test_rates_fall_by_one_schedule():
    assert resolved("--lr_drop_epochs", 3, 5).lr_drop_epochs == [3, 5]
    with pytest.raises(InputError, match="^--lr_drop 4 has no effect with --lr_drop_epochs$"):
        resolved("--lr_drop_epochs", 3, "--lr_drop", 4)
    with pytest.raises(InputError, match="^--lr_drop_epochs 0 must be at least 1$"):
        resolved("--lr_drop_epochs", 3, 0)


def test_a_frozen_detector_is_the_whole_start():
    with pytest.raises(InputError, match="^--pretrain a.pth has no effect with --frozen_weights, which fills the det"):
        resolved("--masks", "--frozen_weights", "b.pth", "--pretrain", "a.pth")


def test_every_flag_that_belongs_to_some_trainings_exists():
    known = vars(parse())
    assert set(recipes.FLAGS_OF) | set(recipes.MODEL_OF) <= set(known)
    assert {name for recipe in recipes.RECIPES.values() for name in recipe} <= set(known)


def test_every_flag_left_open_has_a_default_somewhere():
    """A flag whose default is None is filled in by a recipe, or means "none" or "see the data set" by itself."""
    itself = {"amp", "num_classes", "dataset_file", "coco_path", "coco_panoptic_path", "voc_path", "imagenet_path",
              "imagenet_val_path", "frozen_weights",
              "max_patch", "pretrain_sizes", "pretrain_max_size", "train_sizes", "crop_resize", "crop_size", "device",
              "class_list", "cache_path", "filter_file", "filter_seed", "shots", "class_split", "class_part", "local_rank",
              "train_images", "train_annotations", "val_images", "val_annotations", "overfit", "model",
              "lr_drop_epochs", "dataset", "data_root", "save_every_steps"}
    recipe_flags = {name for recipe in recipes.RECIPES.values() for name in recipe}
    assert {name for name, value in vars(parse()).items() if value is None} - itself <= recipe_flags


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu,cpu"])
def test_unknown_devices(device):
    with pytest.raises(InputError, match=f"^--device {device} is not a device; use cuda, cuda:1 or cpu$"):
        recipes.resolve(parse("--device", device))


def test_a_machine_without_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert recipes.resolve(parse()).device == "cpu"
    with pytest.raises(InputError, match="^--device cuda: this machine has no usable CUDA device; pass --device cpu$"):
        recipes.resolve(parse("--device", "cuda"))


@pytest.mark.parametrize("flag", ["batch_size", "accumulate_steps", "eval_every", "lr_drop", "num_queries",
                                  "num_patches", "hidden_dim", "nheads", "dec_layers", "patch_size",
                                  "pretrain_max_size"])
def test_counts_must_be_positive(flag):
    for value in (0, -3):
        with pytest.raises(InputError, match=f"^--{flag} {value} must be at least 1$"):
            resolved("--dataset_file", "imagenet", f"--{flag}", value)


def test_width_must_suit_heads_and_positions():
    for flags in (("--hidden_dim", 30, "--nheads", 5), ("--hidden_dim", 64, "--nheads", 6)):
        message = f"^--hidden_dim {flags[1]} must be a multiple of 4 and of --nheads {flags[3]}$"
        with pytest.raises(InputError, match=message):
            resolved(*flags)


def test_tensorboard_follows_a_training_with_a_folder():
    assert resolved("--tensorboard", "--output_dir", "out").tensorboard
    with pytest.raises(InputError, match="^--tensorboard writes down a training in --output_dir; that flag is missing$"):
        resolved("--tensorboard")
    with pytest.raises(InputError, match="^--tensorboard .*; --eval doesn't train$"):
        resolved("--tensorboard", "--output_dir", "out", "--eval")


@pytest.mark.parametrize("dataset, flag", [("coco", "coco_path"), ("coco_panoptic", "coco_path"), ("voc", "voc_path"),
                                           ("imagenet", "imagenet_path")])
def test_data_must_be_somewhere(dataset, flag):
    with pytest.raises(InputError, match=f"^--{flag} is missing: where is the data set"):
        recipes.require_data(resolved("--dataset_file", dataset))
    recipes.require_data(resolved(f"--{flag}", "somewhere"))


def test_panoptic_data_lies_in_two_places():
    with pytest.raises(InputError, match="^--coco_panoptic_path is missing: where is the data set"):
        recipes.require_data(resolved("--dataset_file", "coco_panoptic", "--coco_path", "images"))
    recipes.require_data(resolved("--coco_path", "images", "--coco_panoptic_path", "annotations"))


def test_own_files_are_data_too():
    recipes.require_data(resolved("--train_images", "a", "--train_annotations", "b.json"))
    recipes.require_data(resolved("--val_images", "a", "--val_annotations", "b.json", "--eval"))


def test_the_start_of_the_log_names_every_value():
    args = resolved("--imagenet_path", "images", "--num_patches", 5)
    title, changed, values = recipes.describe(args).splitlines()
    assert changed == "differing from the defaults: device=cpu  imagenet_path=images  num_patches=5"
    assert title == "UP-DETR pre-training"
    expected = {"epochs=60", "lr_drop=40", "eos_coef=0.05", "num_patches=5", "imagenet_path=images"}
    assert expected <= set(values.split("  "))
    assert "resolved" not in values


# The command line.

# Flags of ours that no original has. A new flag is a decision: it enters this list with it.
OWN = {"--accumulate_steps", "--amp", "--tf32", "--compile", "--no_fuse", "--backbone_last_layer", "--num_classes",
       "--no_attention_mask", "--match_within_group", "--group_by_aspect", "--load_embedding", "--position_from_centre",
       "--patch_size", "--min_patch", "--max_patch", "--pretrain_sizes",
       "--pretrain_max_size", "--voc_path", "--imagenet_val_path", "--held_out_share", "--train_sizes", "--crop_resize",
       "--crop_size", "--val_size", "--max_size", "--mask_softmax", "--local_rank", "--local-rank",
       "--train_images", "--train_annotations", "--val_images", "--val_annotations", "--overfit", "--tensorboard",
       "--class_list", "--filter_file", "--filter_seed", "--shots", "--shots_of", "--class_split", "--class_part",
       "--save_every_steps", "--dist_timeout", "--apply_exif"}
# Flags of the originals that this program doesn't have: images are read as they are needed, and `tools.predict` draws.
ABSENT = {"--cache_mode", "--viz"}
# Flags that an original accepts in a training where they do nothing; here they are refused there.
WITHOUT_EFFECT = {"updetr_pretrain": {"--mask_loss_coef", "--dice_loss_coef"},
                  "deformable": {"--masks", "--frozen_weights", "--mask_loss_coef", "--dice_loss_coef"},
                  "detreg": {"--masks", "--frozen_weights", "--mask_loss_coef", "--dice_loss_coef",
                             "--remove_difficult", "--pre_norm", "--eos_coef", "--filter_pct", "--filter_num"}}
# Whose choices differ: proposals are chosen by the paper's names.
OTHER_CHOICES = {"--strategy"}
RECIPE_FLAGS = {"detr": (), "updetr_finetune": (), "updetr_pretrain": ("--dataset_file", "imagenet"),
                "deformable": ("--model", "deformable_detr"), "detreg": ("--dataset_file", "regions")}
TYPES = {"float": float, "int": int, "str": str, None: str}


def own_flags():
    return {option: action for action in get_args_parser()._actions for option in action.option_strings}


def test_no_flag_came_or_went(original_flags):
    originals = {flag for program in original_flags.values() for flag in program}
    assert set(own_flags()) == (originals - ABSENT) | OWN


@pytest.mark.parametrize("program", RECIPE_FLAGS)
def test_flags_of_the_originals_keep_their_meaning(original_flags, program):
    own, args = own_flags(), resolved(*RECIPE_FLAGS[program])
    for flag, original in original_flags[program].items():
        if flag in ABSENT or flag in WITHOUT_EFFECT.get(program, ()):
            continue
        action = own[flag]
        assert action.dest == original["dest"], flag
        assert type(action).__name__ == f"_{original['action']}", flag
        if original["action"] == "StoreAction":
            assert (action.type or str) is TYPES[original["type"]], flag
        if original["choices"] and flag not in OTHER_CHOICES:
            assert list(action.choices) == original["choices"], flag
        # Decided by the machine, or by the path that is given.
        if flag in ("--device", "--num_workers", "--dataset_file", "--imagenet_path", "--coco_path", "--dataset",
                    "--data_root"):
            continue
        if program == "detreg" and original["default"] is None:
            continue  # decided by --model, in the original too
        assert getattr(args, action.dest) == (original["default"] if flag != "--remove_difficult" else False), flag


def test_unknown_data_sets_and_shortened_flags_are_refused(capsys):
    for flags in (("--dataset_file", "lvis"), ("--lr_back", "1e-5"), ("--imagenet", "x")):
        with pytest.raises(SystemExit):
            parse(*flags)
    assert "invalid choice: 'lvis'" in capsys.readouterr().err
