"""Two processes compute the gradients that one process computes on the same images."""
import textwrap

import pytest
import torch

from commands import ROOT, run

PROGRAM = """
    import sys
    import torch
    from torch import nn
    from main import get_args_parser
    from models import build_model
    from util.distributed import get_rank, get_world_size, init_distributed_mode

    args = get_args_parser().parse_args(sys.argv[2:])
    init_distributed_mode(args)
    torch.manual_seed(0)
    model, criterion, _ = build_model(args)
    images = torch.randn(4, 3, 128, 128)
    counts = [3, 2, 0, 0]  # the second process has no objects at all
    targets = [{"labels": torch.randint(5, (n,)), "boxes": torch.rand(n, 4) * 0.3 + 0.3} for n in counts]
    share = slice(get_rank() * 4 // get_world_size(), (get_rank() + 1) * 4 // get_world_size())
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if args.distributed else model
    losses = criterion(wrapped(images[share]), targets[share])
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses).backward()
    if get_rank() == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sys.argv[1])
"""


SMALL = ("--device cpu --backbone resnet18 --load_backbone none --hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 "
         "--dim_feedforward 64 --dropout 0 --num_queries 7 --num_classes 5").split()


@pytest.mark.parametrize("flags", ["--model detr", "--model deformable_detr --with_box_refine --two_stage"])
def test_gradients_of_two_processes_equal_those_of_one(flags, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    for launcher in ("single", "pair"):
        run([program, tmp_path / f"{launcher}.pth", *SMALL, *flags.split()], launcher, env={"PYTHONPATH": str(ROOT)})
    one, two = (torch.load(tmp_path / f"{launcher}.pth", weights_only=True) for launcher in ("single", "pair"))
    assert max(gradient.abs().max() for gradient in one.values()) > 0.01
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
