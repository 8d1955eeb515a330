"""What each of the processes of `test_distributed.py` does; started by torchrun, it leaves its findings in a folder."""
import argparse
import pathlib
import sys
import time
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from models.criterion import SetCriterion
from models.matcher import HungarianMatcher
from util import distributed
from util.metric_logger import MetricLogger

WEIGHTS = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
OBJECTS = [3, 1, 0, 0]  # of each image of the whole batch; the second process's images have none


def batch() -> Tuple[Tensor, List[Dict[str, Tensor]]]:
    """Inputs [4, 6, 8], a row for each of six queries, and targets of four images."""
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(4, 6, 8, generator=generator)
    return inputs, [{"labels": torch.randint(0, 4, (n,), generator=generator),
                     "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.1} for n in OBJECTS]


def loss_and_gradient(inputs: Tensor, targets: List[Dict[str, Tensor]]) -> Tuple[float, Tensor]:
    """Training loss of a linear "detector" with one weight matrix, and that matrix's gradient."""
    weight = torch.randn(8, 9, generator=torch.Generator().manual_seed(9)).requires_grad_()
    criterion = SetCriterion(4, HungarianMatcher(1, 5, 2), WEIGHTS, 0.1, ["labels", "boxes"]).train()
    out = inputs @ weight
    losses = criterion({"pred_logits": out[..., :5], "pred_boxes": out[..., 5:].sigmoid()}, targets)
    loss = sum(losses[name] * factor for name, factor in WEIGHTS.items())
    loss.backward()
    return loss.item(), weight.grad


def findings(folder: pathlib.Path) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    args = argparse.Namespace(device="cpu", dist_url="env://", world_size=1, local_rank=None)
    distributed.init_distributed_mode(args)
    rank = distributed.get_rank()
    found["args"] = [args.distributed, args.rank, args.world_size, args.gpu]
    found["state"] = [distributed.is_dist_avail_and_initialized(), distributed.get_world_size(),
                      distributed.is_main_process()]

    found["gathered"] = distributed.all_gather({"rank": rank, "values": list(range(1 + 1000 * rank))})
    losses = {"b": torch.tensor(1.0 + 2 * rank), "a": torch.tensor(10.0 * rank)}
    found["mean"] = {name: value.item() for name, value in distributed.reduce_dict(losses).items()}
    found["sum"] = {name: value.item() for name, value in distributed.reduce_dict(losses, average=False).items()}
    found["kept"] = {name: value.item() for name, value in losses.items()}
    values = torch.tensor([1.0, rank])
    found["reduced"] = distributed.reduce_sum(values).tolist()
    found["reduced_kept"] = values.tolist()

    logger = MetricLogger()
    for value in [[1.0, 2.0, 3.0], [10.0]][rank]:
        logger.update(loss=torch.tensor(value))
    if rank == 1:
        logger.update(seldom=4.0)
    logger.synchronize_between_processes()
    found["averages"] = logger.averages()
    for _ in logger.log_every(range(3), 1, "Test:"):
        pass

    with distributed.local_main_first():
        if rank == 0:
            time.sleep(0.3)
        with open(folder / "order", "a") as file:
            file.write(str(rank))
    distributed.print_main("printed by the main process")

    inputs, targets = batch()
    share = slice(2 * rank, 2 * rank + 2)
    found["loss"], found["gradient"] = loss_and_gradient(inputs[share], targets[share])
    distributed.barrier()
    distributed.shutdown()
    found["left"] = [distributed.is_dist_avail_and_initialized(), distributed.get_world_size(), distributed.get_rank()]
    return {"rank": rank, **found}


if __name__ == "__main__":
    output = pathlib.Path(sys.argv[1])
    result = findings(output)
    torch.save(result, output / f"{result['rank']}.pt")
