"""Published checkpoints fit: names and shapes of every tensor, what trains, the losses and their weights."""
import pytest
import torch

from main import build_optimizer, get_args_parser
from models import build_model
from util.checkpoint import load_model_strictly, load_pretrained

DETECTORS = ["detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5", "detr_resnet50_pre_norm",
             "detr_resnet50_learned_pos", "detr_resnet50_no_aux", "detr_resnet50_voc", "updetr_finetune"]
PANOPTIC = ["detr_resnet50_panoptic", "detr_resnet101_panoptic", "detr_resnet50_panoptic_frozen"]
PRETRAINING = ["updetr_pretrain", "updetr_pretrain_no_recon", "updetr_pretrain_train_cnn"]
DEFORMABLE = ["deformable_detr", "deformable_detr_single_scale", "deformable_detr_single_scale_dc5", "deformable_detr_refine",
              "deformable_detr_two_stage", "deformable_detr_two_stage_no_refine"]
DETREG_PRETRAINING = ["detreg_detr_pretrain", "detreg_detr_pretrain_head", "detreg_def_pretrain",
                      "detreg_def_pretrain_head", "detreg_def_pretrain_refine"]
DETREG = [*DETREG_PRETRAINING, "detreg_detr_finetune", "detreg_def_finetune_voc"]

# Recorded for every model, but flags here only where there are masks, or for DETR only.
OF_MASKS = {"masks", "frozen_weights", "mask_loss_coef", "dice_loss_coef"}
OF_DETR = {"pre_norm", "eos_coef"}
# Recorded for every model of DETReg's program, which trained them all.
OF_REGIONS = {"object_embedding_loss", "obj_embedding_head", "object_embedding_coef", "strategy", "max_prop"}
OF_DEFORMABLE = {"num_feature_levels", "focal_alpha", "lr_linear_proj_names", "lr_linear_proj_mult"}
OTHERWISE = {"cache_mode", "dataset"}


def published_args(published, name, **changes):
    """Flags of a published model. Classes aren't a flag in the originals: the size of the class weights tells them."""
    facts = published["models"][name]
    recorded = {**published["models"]["detr_resnet50"]["args"], **facts["args"]}
    recorded["dataset_file"] = recorded["dataset_file"].lower()
    args = get_args_parser().parse_args(["--load_backbone", "none"])
    without = set() if recorded["masks"] else OF_MASKS
    if name in DETREG:
        without = OF_MASKS | OTHERWISE | (OF_DEFORMABLE if recorded["model"] == "detr" else OF_DETR)
        if name in DETREG_PRETRAINING:
            recorded["dataset_file"] = "regions"
        else:
            without |= OF_REGIONS
        args.num_classes = published_shapes(published, name).get("class_embed.0.weight", [91])[0]
    elif name in DEFORMABLE:
        args.model, without = "deformable_detr", OF_MASKS | OF_DETR
        args.num_classes = published_shapes(published, name)["class_embed.0.weight"][0]
    elif recorded["dataset_file"] != "imagenet":
        args.num_classes = facts["criterion_state"]["empty_weight"][0] - 1
    for flag, value in {**recorded, **changes}.items():
        if flag not in without:
            assert hasattr(args, flag), f"no flag --{flag}"
            setattr(args, flag, value)
    return args


def published_shapes(published, name):
    facts = published["models"][name]
    shapes = dict(published_shapes(published, facts["like"])) if facts["like"] else {}
    for key in facts["remove"]:
        del shapes[key]
    return {**shapes, **facts["add"]}


def build_without_memory(args):
    args.device = "meta"
    with torch.device("meta"):
        return build_model(args)


def shapes_of(module):
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", DETECTORS + PANOPTIC + PRETRAINING + DEFORMABLE + DETREG)
def test_model_equals_the_published_one(published, name):
    facts = published["models"][name]
    model, criterion, postprocessors = build_without_memory(published_args(published, name))

    assert shapes_of(model) == published_shapes(published, name)
    assert len(model.state_dict()) == facts["n_keys"]
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == facts["n_parameters"]
    assert sum(parameter.numel() for parameter in parameters.values()
               if parameter.requires_grad) == facts["n_trainable"]
    assert sorted(key for key, parameter in parameters.items()
                  if not parameter.requires_grad) == sorted(facts["frozen"])
    assert shapes_of(criterion) == facts["criterion_state"]
    assert criterion.weight_dict == facts["weight_dict"]
    assert sorted(postprocessors) == facts["postprocessors"]


@pytest.mark.parametrize("name", DEFORMABLE + DETREG_PRETRAINING[2:])
def test_tensors_with_several_names_are_the_published_ones(published, name):
    """Heads that all layers share, and heads that the decoder holds too."""
    facts = published["models"]
    tied = facts[name].get("tied", facts[facts[name]["like"] or name]["tied"])
    parameters = dict(build_without_memory(published_args(published, name))[0].named_parameters(remove_duplicate=False))
    groups = {}
    for key, parameter in parameters.items():
        groups.setdefault(id(parameter), set()).add(key)
    expected = {}
    for alias, key in tied.items():
        expected.setdefault(key, {key}).add(alias)
    assert sorted(map(sorted, expected.values())) == sorted(sorted(group) for group in groups.values() if len(group) > 1)


@pytest.mark.parametrize("name", DEFORMABLE)
def test_optimizer_groups_of_deformable_detr(published, name):
    """Where it looks is learnt at a tenth of the rate, the backbone's levels at the backbone's."""
    args = published_args(published, name)
    model = build_without_memory(args)[0]
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = build_optimizer(model, args).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([2e-4, 2e-5, 2e-5])
    rest, backbone, looking = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert backbone == {key for key, value in model.named_parameters()
                        if key.startswith("backbone.0.") and value.requires_grad}
    assert looking == {key for key in names.values() if "sampling_offsets" in key or "reference_points" in key}
    assert len(looking) == 2 * 12 + (0 if args.two_stage else 2)
    assert len(rest | backbone | looking) == sum(value.requires_grad for value in model.parameters())
    args.sgd = True
    assert isinstance(build_optimizer(model, args), torch.optim.SGD)
    assert build_optimizer(model, args).defaults["momentum"] == 0.9


def test_parameters_are_in_the_published_order(published):
    """A saved optimizer knows parameters by their position alone."""
    own = list(build_without_memory(published_args(published, "detr_resnet50"))[0].state_dict())
    assert own == list(published["models"]["detr_resnet50"]["add"])
    own = list(build_without_memory(published_args(published, "updetr_pretrain"))[0].state_dict())
    own_panoptic = list(build_without_memory(published_args(published, "detr_resnet50_panoptic"))[0].state_dict())
    assert own_panoptic == list(published["models"]["detr_resnet50_panoptic"]["add"])
    pretext_only = [key for key in published["models"]["updetr_pretrain"]["add"] if not key.startswith("class_embed")]
    assert [key for key in own if key in pretext_only] == pretext_only


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_no_aux", *PANOPTIC[::2], *PRETRAINING[:2],
                                  *DEFORMABLE, *DETREG_PRETRAINING])
def test_losses_are_reported_under_the_published_names(published, images, targets, name):
    small = dict(backbone="resnet18", dilation=False, hidden_dim=32, nheads=4, enc_layers=1, dim_feedforward=32)
    model, criterion, _ = build_model(published_args(published, name, **small))
    inputs = [images]
    if name in PRETRAINING:
        inputs.append(torch.randn(2, 10, 3, 32, 32))
        targets = [{"labels": torch.ones(10, dtype=torch.int64), "boxes": torch.rand(10, 4) * 0.4 + 0.1}] * 2
    if name in DETREG_PRETRAINING:
        targets = [{**target, "patches": torch.randn(len(target["labels"]), 3, 32, 32)} for target in targets]
    if name in PANOPTIC:
        targets = [{**target, "masks": torch.rand(len(target["labels"]), *image.shape[1:]) > 0.5}
                   for target, image in zip(targets, images)]
    losses = criterion(model(*inputs), targets)
    assert sorted(losses) == published["models"][name]["loss_keys"]
    without_loss = set(criterion.weight_dict) - set(losses)
    # The published programs too give the earlier layers weights for masks, which they don't predict, and weights for
    # proposals to models without.
    assert all(name.startswith(("loss_mask_", "loss_dice_")) or name.endswith("_enc") for name in without_loss)
    assert all(loss.isfinite() for loss in losses.values())


def test_fine_tuning_takes_from_a_pretrained_model_what_the_original_takes(published, capsys):
    facts = published["pretrain_to_finetune"]["updetr_pretrain -> updetr_finetune"]
    shapes = published_shapes(published, "updetr_pretrain")
    pretrained = {"model": {name: torch.zeros(shape) for name, shape in shapes.items()}}
    # 2 classes and "no object": the pretext's class head has the very shape of this fine-tuning's, yet must not enter.
    for num_classes in (91, 2):
        model = build_model(published_args(published, "updetr_finetune", num_classes=num_classes))[0]
        report = load_pretrained(model, pretrained, "checkpoint.pth")
        assert report["missed"] == facts["missing"]
        # The original deletes the class head before it loads, so that it doesn't count as unexpected.
        assert set(report["skipped"]) - {"class_embed.weight", "class_embed.bias"} == set(facts["unexpected"])
        assert sorted(report["loaded"]) == sorted(set(model.state_dict()) - set(facts["missing"]))
        state = model.state_dict()
        assert all((state[name] == 0).all() for name in report["loaded"])
        assert state["class_embed.weight"].abs().sum() > 0
    printed = capsys.readouterr().out
    assert "pretrain: missed 2 tensors: class_embed.bias, class_embed.weight" in printed
    assert "pretrain: skipped 8 tensors" in printed


@pytest.mark.parametrize("before, after, changes", [
    ("detreg_detr_pretrain", "detreg_detr_finetune", {}), ("detreg_def_pretrain", "deformable_detr", {}),
    ("detreg_def_pretrain", "deformable_detr_refine", {}),
    ("detreg_def_pretrain", "deformable_detr", {"num_classes": 21}), ("detreg_def_pretrain_refine", "deformable_detr_refine", {})])
def test_fine_tuning_takes_all_of_a_detreg_but_its_class_and_its_embeddings(published, before, after, changes):
    model = build_model(published_args(published, after, **changes))[0]
    pretrained = {name: torch.zeros(shape) for name, shape in published_shapes(published, before).items()}
    report = load_pretrained(model, {"model": pretrained}, "checkpoint.pth")
    name = f"{before} -> {after.replace('deformable_detr', 'detreg_def_finetune')}"
    if name in published["pretrain_to_finetune"]:
        facts = published["pretrain_to_finetune"][name]
        assert report["missed"] == facts["missing"]
        assert {key for key in report["skipped"] if not key.startswith("class_embed.")} == set(facts["unexpected"])
    assert all("class_embed" in key or "bbox_embed" in key for key in report["missed"])
    assert all((value == 0).all() for key, value in model.state_dict().items() if "class_embed" not in key)
    assert all(value.any() for key, value in model.state_dict().items() if "class_embed" in key)


def test_a_detregs_class_is_kept_only_when_asked_for(published):
    shapes = published_shapes(published, "detreg_def_pretrain")
    pretrained = {name: torch.zeros(shape) for name, shape in shapes.items()}
    model = build_model(published_args(published, "deformable_detr"))[0]
    report = load_pretrained(model, {"model": pretrained}, "checkpoint.pth", reset_classes=False)
    assert not report["missed"] and not model.state_dict()["class_embed.0.weight"].any()


def test_official_checkpoint_layout_loads_strictly(published):
    """Official files hold `model` and, some of them, more; every tensor arrives."""
    shapes = published_shapes(published, "detr_resnet50")
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    model = build_model(published_args(published, "detr_resnet50"))[0]
    load_model_strictly(model, {"model": state, "epoch": 299}, "detr-r50-e632da11.pth")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_stem_and_layer1_never_train(tiny_args):
    for lr_backbone, trained_layers in ((1e-5, {"layer2", "layer3", "layer4"}), (0.0, set())):
        body = build_model(tiny_args(lr_backbone=lr_backbone))[0].backbone[0].body
        assert {name.split(".")[0] for name, parameter in body.named_parameters()
                if parameter.requires_grad} == trained_layers


def test_patches_must_divide_the_queries(tiny_args):
    with pytest.raises(ValueError, match="--num_queries 12 is not a multiple of --num_patches 5"):
        build_model(tiny_args(pretraining=True, num_patches=5))
