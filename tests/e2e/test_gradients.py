"""Two processes compute the gradients that one process computes on the same images."""
import textwrap

import torch

from commands import ROOT, run

PROGRAM = """
    import sys
    import torch
    from torch import nn
    from models.backbone import Backbone, Joiner
    from models.criterion import SetCriterion, weights_for_layers
    from models.detr import DETR
    from models.matcher import HungarianMatcher
    from models.position_encoding import PositionEmbeddingSine
    from models.transformer import Transformer
    from util.distributed import get_rank, get_world_size, init_distributed_mode
    import argparse

    args = argparse.Namespace(device="cpu", dist_url="env://", world_size=1)
    init_distributed_mode(args)
    torch.manual_seed(0)
    backbone = Backbone("resnet18", train_backbone=True, return_interm_layers=False, dilation=False)
    model = DETR(Joiner(backbone, PositionEmbeddingSine(16, normalize=True)),
                 Transformer(32, 2, 1, 2, 64, dropout=0, return_intermediate_dec=True), 5, 7, aux_loss=True)
    weights = weights_for_layers({"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}, 2)
    criterion = SetCriterion(5, HungarianMatcher(1, 5, 2), weights, 0.1, ["labels", "boxes", "cardinality"])
    images = torch.randn(4, 3, 64, 64)
    counts = [3, 2, 0, 0]  # the second process has no objects at all
    targets = [{"labels": torch.randint(5, (n,)), "boxes": torch.rand(n, 4) * 0.3 + 0.3} for n in counts]
    share = slice(get_rank() * 4 // get_world_size(), (get_rank() + 1) * 4 // get_world_size())
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if args.distributed else model
    losses = criterion(wrapped(images[share]), targets[share])
    sum(losses[name] * weight for name, weight in weights.items()).backward()
    if get_rank() == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sys.argv[1])
"""


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    for launcher in ("single", "torchrun"):
        run([program, tmp_path / f"{launcher}.pth"], launcher, env={"PYTHONPATH": str(ROOT)})
    one, two = (torch.load(tmp_path / f"{launcher}.pth") for launcher in ("single", "torchrun"))
    assert max(gradient.abs().max() for gradient in one.values()) > 0.01
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
