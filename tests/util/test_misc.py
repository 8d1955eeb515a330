"""Batching of images, and the small helpers."""
import math

import pytest
import torch

from util import misc
from util.misc import NestedTensor, accuracy, collate_fn, interpolate, inverse_sigmoid, nested_tensor_from_tensor_list


def test_images_are_padded_on_the_right_and_below():
    first, second = torch.full((3, 2, 4), 5.0), torch.full((3, 3, 1), 7.0)
    tensors, mask = nested_tensor_from_tensor_list([first, second]).decompose()
    assert tensors.shape == (2, 3, 3, 4) and mask.shape == (2, 3, 4) and mask.dtype == torch.bool
    assert tensors[0, 0].tolist() == [[5, 5, 5, 5], [5, 5, 5, 5], [0, 0, 0, 0]]
    assert tensors[1, 2].tolist() == [[7, 0, 0, 0]] * 3
    assert mask[0].int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert mask[1].int().tolist() == [[0, 1, 1, 1]] * 3


def test_nothing_is_padding_where_sizes_are_equal():
    batch = torch.randn(2, 3, 4, 5)
    for given in (batch, list(batch)):
        nested = nested_tensor_from_tensor_list(given)
        assert torch.equal(nested.tensors, batch) and not nested.mask.any()


def test_bad_images_are_refused():
    with pytest.raises(ValueError, match=r"expected images of shape \[channels, height, width\], got \[4, 5\]"):
        nested_tensor_from_tensor_list([torch.zeros(4, 5)])
    with pytest.raises(ValueError, match="images of one batch differ in their number of channels"):
        nested_tensor_from_tensor_list([torch.zeros(3, 4, 5), torch.zeros(1, 4, 5)])


def test_batches_have_the_layout_of_their_images():
    images = [torch.rand(4, 5, 3).permute(2, 0, 1), torch.rand(6, 2, 3).permute(2, 0, 1)]
    batch, mask = nested_tensor_from_tensor_list(images).decompose()
    plain, same_mask = nested_tensor_from_tensor_list([image.contiguous() for image in images]).decompose()
    assert torch.equal(batch, plain) and torch.equal(mask, same_mask) and plain.is_contiguous()
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_nested_tensors_move_and_describe_themselves():
    nested = nested_tensor_from_tensor_list([torch.zeros(3, 2, 2)])
    moved = nested.to(torch.device("meta"))
    assert moved.tensors.device.type == moved.mask.device.type == "meta"
    assert NestedTensor(torch.zeros(1), None).to(torch.device("cpu")).mask is None
    assert repr(nested) == "NestedTensor of shape torch.Size([1, 3, 2, 2])"


def test_nested_tensors_script():
    @torch.jit.script
    def pad(images: list[torch.Tensor]):
        return nested_tensor_from_tensor_list(images).decompose()

    images = [torch.randn(3, 4, 5), torch.randn(3, 6, 2)]
    tensors, mask = pad(images)
    expected = nested_tensor_from_tensor_list(images)
    assert torch.equal(tensors, expected.tensors) and torch.equal(mask, expected.mask)


def test_collate_detection_samples():
    targets = [{"labels": torch.tensor([1])}, {"labels": torch.tensor([])}]
    batch = [(torch.zeros(3, 4, 5), targets[0]), (torch.zeros(3, 6, 2), targets[1])]
    images, collated = collate_fn(batch)
    assert images.tensors.shape == (2, 3, 6, 5)
    assert collated == tuple(targets)


def test_collate_pretext_samples():
    batch = [(torch.zeros(3, 4, 5), torch.full((7, 3, 8, 8), float(i)), {"image_id": torch.tensor([i])})
             for i in range(2)]
    images, patches, targets = collate_fn(batch)
    assert images.mask.shape == (2, 4, 5) and patches.shape == (2, 7, 3, 8, 8)
    assert patches[:, 0, 0, 0, 0].tolist() == [0, 1] and [int(target["image_id"]) for target in targets] == [0, 1]


def test_accuracy_by_hand():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    target = torch.tensor([1, 1, 0, 2])
    # Ranks of the true classes: first, second, third, third.
    assert [value.item() for value in accuracy(scores, target, topk=(1, 2, 3))] == [25, 50, 100]
    assert [value.item() for value in accuracy(scores, target)] == [25]


def test_accuracy_on_views_that_are_not_contiguous():
    scores = torch.randn(5, 8).T
    target = torch.arange(20)[::4] % 5
    assert not scores.is_contiguous()
    views = accuracy(scores[:5], target, topk=(1, 3))
    copies = accuracy(scores[:5].contiguous(), target.clone(), topk=(1, 3))
    assert views == copies


def test_accuracy_without_rows_is_zero():
    shares = accuracy(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), topk=(1, 2))
    assert [share.item() for share in shares] == [0, 0]


def test_inverse_sigmoid():
    x = torch.linspace(-8, 8, 33)
    torch.testing.assert_close(inverse_sigmoid(x.sigmoid()), x, rtol=1e-3, atol=1e-3)
    limit = math.log(1 / 1e-5)
    assert inverse_sigmoid(torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.0])).tolist() == pytest.approx(
        [-limit, -limit, 0, limit, limit], rel=1e-4)


def test_interpolate_takes_sizes_and_empty_batches():
    assert interpolate(torch.tensor([[[[1.0, 2.0]]]]), size=[2, 4])[0, 0].tolist() == [[1, 1, 2, 2]] * 2
    empty = interpolate(torch.zeros(0, 1, 4, 4), scale_factor=2.0, mode="bilinear", align_corners=False)
    assert empty.shape == (0, 1, 8, 8)


def test_names_that_users_import():
    expected = {"NestedTensor", "nested_tensor_from_tensor_list", "collate_fn", "MetricLogger", "SmoothedValue",
                "init_distributed_mode", "get_rank", "get_world_size", "is_main_process", "reduce_dict", "all_gather",
                "accuracy", "interpolate", "inverse_sigmoid"}
    assert expected <= set(misc.__all__) and all(hasattr(misc, name) for name in misc.__all__)
