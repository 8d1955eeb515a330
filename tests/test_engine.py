"""The loops as a notebook calls them."""
import torch

from engine import as_tensors, train_one_epoch
from models import build_model
from util.misc import collate_fn


def test_a_device_may_be_a_string_and_a_loss_term_a_number(tiny_args, targets):
    model, criterion, _ = build_model(tiny_args())
    forward = criterion.forward
    criterion.forward = lambda outputs, expected: {**forward(outputs, expected), "loss_none": 0.0}
    criterion.weight_dict["loss_none"] = 1.0
    batch = collate_fn([(torch.rand(3, 64, 64), target) for target in targets])
    stats = train_one_epoch(model, criterion, [batch], torch.optim.SGD(model.parameters(), lr=0.0), "cpu", 0, 0.1)
    assert stats["loss_none"] == 0.0 and stats["loss"] > 0


def test_numbers_become_tensors_and_tensors_stay():
    value = torch.tensor(2.0, requires_grad=True)
    made = as_tensors({"a": value, "b": 3}, torch.device("cpu"))
    assert made["a"] is value and made["b"].item() == 3.0
