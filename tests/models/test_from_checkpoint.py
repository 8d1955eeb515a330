"""A run takes its model's shape from the checkpoint that it starts from, unless flags say otherwise."""
import argparse

import pytest
import torch

import main
from models import build_model
from models.from_checkpoint import model_flags
from util import recipes
from util.errors import InputError
from util.training_state import plain_args

TINY = ("--device cpu --backbone resnet18 --backbone_last_layer layer3 --load_backbone none --hidden_dim 32 --nheads 4 "
        "--dim_feedforward 48 --enc_layers 1 --dec_layers 2 --num_queries 7 --num_classes 3").split()
SHAPE = ("model", "backbone", "backbone_last_layer", "hidden_dim", "nheads", "dim_feedforward", "enc_layers", "dec_layers",
         "num_queries", "pre_norm", "two_stage", "with_box_refine", "num_feature_levels", "enc_n_points", "position_embedding")


def parse(*flags):
    return recipes.resolve(main.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)]))


def trained(*flags):
    args = parse(*TINY, *flags)
    return args, {"model": build_model(args)[0].state_dict(), "args": plain_args(args)}


@pytest.mark.parametrize("flags", [(), ("--pre_norm", "--position_embedding", "learned"), (
    "--model", "deformable_detr", "--with_box_refine", "--two_stage", "--num_feature_levels", 2, "--enc_n_points", 3)])
@pytest.mark.parametrize("start", ["--resume", "--pretrain"])
def test_the_checkpoint_tells_the_shape(start, flags):
    first, checkpoint = trained(*flags)
    args = parse(start, "a.pth", "--num_classes", 3, "--load_backbone", "none")
    main.follow_checkpoint(args, checkpoint)
    if start == "--pretrain" and "--two_stage" in flags:  # no flag could say otherwise: it has to be given
        assert not args.two_stage
        return
    assert {name: getattr(args, name) for name in SHAPE} == {name: getattr(first, name) for name in SHAPE}
    assert args.lr == first.lr and args.set_cost_class == first.set_cost_class  # defaults of the model that it is
    build_model(args)[0].load_state_dict(checkpoint["model"])


def test_published_weights_alone_tell_it_too():
    first, checkpoint = trained("--nheads", 8)
    args = parse("--resume", "a.pth", "--eval")
    main.follow_checkpoint(args, {"model": checkpoint["model"], "args": argparse.Namespace(nheads=8)})
    assert (args.hidden_dim, args.nheads, args.num_queries) == (32, 8, 7)
    assert model_flags({"model": {"fc.weight": torch.zeros(1)}}, "x", None) == {}


def test_flags_that_contradict_the_model_are_refused():
    _, checkpoint = trained()
    for flags, has in ((("--nheads", 2), 4), (("--hidden_dim", 64), 32), (("--model", "deformable_detr"), "detr"),
                       (("--enc_layers", 3), 1)):
        args = parse("--resume", "a.pth", *flags)
        with pytest.raises(InputError, match=f"^{flags[0]} {flags[1]} contradicts --resume a.pth, whose model has {has}$"):
            main.follow_checkpoint(args, checkpoint)
    args = parse("--pretrain", "a.pth", "--num_queries", 9)
    main.follow_checkpoint(args, checkpoint)
    assert (args.num_queries, args.hidden_dim) == (9, 32)


def test_a_continued_training_keeps_rates_and_schedule_that_no_flag_names():
    _, checkpoint = trained("--lr", 3e-4, "--weight_decay", 0.2, "--lr_drop", 7, "--lr_backbone", 0)
    args = parse("--resume", "a.pth")
    main.follow_checkpoint(args, checkpoint)
    assert (args.lr, args.weight_decay, args.lr_drop, args.lr_backbone) == (3e-4, 0.2, 7, 0)
    args = parse("--resume", "a.pth", "--lr", 1e-5, "--lr_drop_epochs", 2, 3)
    main.follow_checkpoint(args, checkpoint)
    assert (args.lr, args.weight_decay, args.lr_drop_epochs) == (1e-5, 0.2, [2, 3])
    args = parse("--pretrain", "a.pth")
    main.follow_checkpoint(args, checkpoint)
    assert (args.lr, args.weight_decay, args.lr_drop) == (1e-4, 1e-4, 200)


def test_an_evaluation_may_change_what_no_tensor_shows(capsys):
    _, checkpoint = trained()
    args = parse("--resume", "a.pth", "--eval", "--position_embedding_scale", 3)
    main.follow_checkpoint(args, checkpoint)
    assert args.position_embedding_scale == 3
    assert "--position_embedding_scale 3.0 counts more than 6.28" in capsys.readouterr().out
