"""Transforms by their published names and arguments, on Pillow images and tensors, with users' own among them."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from datasets import transforms as T
from datasets.coco import CocoDetection, make_coco_transforms
from datasets.two_arguments import adapt

MEAN, STD = [0.4, 0.5, 0.6], [0.1, 0.2, 0.4]


def sample(pillow=True):
    """A picture of 80 x 60 pixels that are 51, with a box whose mask fills it."""
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 20:40, 10:50] = True
    target = {"boxes": torch.tensor([[10.0, 20.0, 50.0, 40.0]]), "labels": torch.tensor([1]),
              "area": torch.tensor([800.0]), "iscrowd": torch.tensor([0]), "masks": masks}
    image = Image.new("RGB", (80, 60), (51, 51, 51))
    return (image if pillow else torch.full((3, 60, 80), 51, dtype=torch.uint8)), target


@pytest.mark.parametrize("pillow", [True, False])
@pytest.mark.parametrize("transform, size, boxes", [
    (lambda image, target: T.hflip(image, target), (60, 80), [[30, 20, 70, 40]]),
    (lambda image, target: T.crop(image, target, (10, 20, 40, 50)), (40, 50), [[0, 10, 30, 30]]),
    (lambda image, target: T.pad(image, target, (4, 7)), (67, 84), [[10, 20, 50, 40]]),
    (lambda image, target: T.resize(image, target, 30, 100), (30, 40), [[5, 10, 25, 20]]),
    (lambda image, target: T.resize(image, target, (160, 60)), (60, 160), [[20, 20, 100, 40]]),   # (width, height)
    (T.CenterCrop((40, 60)), (40, 60), [[0, 10, 40, 30]]),
    (T.RandomCrop((60, 80)), (60, 80), [[10, 20, 50, 40]]),
    (T.RandomSizeCrop(384, 600), (60, 80), [[10, 20, 50, 40]]),
    (T.RandomHorizontalFlip(1.0), (60, 80), [[30, 20, 70, 40]]),
    (T.RandomHorizontalFlip(0.0), (60, 80), [[10, 20, 50, 40]]),
    (T.RandomResize([30], max_size=100), (30, 40), [[5, 10, 25, 20]]),
    (T.RandomResize([(160, 60)]), (60, 160), [[20, 20, 100, 40]]),
    (T.RandomPad(0), (60, 80), [[10, 20, 50, 40]]),
    (T.RandomSelect(T.RandomHorizontalFlip(1.0), T.CenterCrop((40, 60)), 1.0), (60, 80), [[30, 20, 70, 40]]),
    (T.RandomSelect(T.RandomHorizontalFlip(1.0), T.CenterCrop((40, 60)), 0.0), (40, 60), [[0, 10, 40, 30]])])
def test_geometry(transform, size, boxes, pillow):
    image, target = sample(pillow)
    before = target["boxes"].clone()
    image, result = transform(image, target)
    assert isinstance(image, Image.Image) == pillow and T.image_size(image) == size
    assert result["boxes"].tolist() == boxes and torch.equal(target["boxes"], before)
    assert result["masks"].shape == (1, *size)
    left, top, right, bottom = map(int, boxes[0])
    assert result["masks"].sum() == result["masks"][0, top:bottom, left:right].sum() == (bottom - top) * (right - left)


def test_pixels_become_numbers():
    for pillow in (True, False):
        image, target = T.ToTensor()(*sample(pillow))
        assert image.dtype == torch.float32 and torch.allclose(image, torch.tensor(0.2))
        image, result = T.Normalize(MEAN, STD)(image, target)
        torch.testing.assert_close(image[:, 0, 0], torch.tensor([-2.0, -1.5, -1.0]))
        assert result["boxes"].tolist() == [[30 / 80, 0.5, 0.5, pytest.approx(1 / 3)]]
        torch.testing.assert_close(T.Normalize(MEAN, STD)(*sample(pillow))[0], image)   # bytes are scaled first
    assert torch.equal(T.Normalize(list(T.IMAGENET_MEAN), list(T.IMAGENET_STD))(*sample(False))[0],
                       T.normalize_image(sample(False)[0]))


def test_pads_and_crops_stay_in_their_range():
    sizes = {T.image_size(T.RandomPad(2)(sample()[0], None)[0]) for _ in range(200)}
    assert sizes == {(60 + y, 80 + x) for x in range(3) for y in range(3)}
    target = sample()[1]
    lefts = set()
    for _ in range(100):
        _, result = T.RandomCrop((60, 70))(sample()[0], target)
        lefts.add(10 - int(result["boxes"][0, 0]))
    assert lefts == set(range(11))
    with pytest.raises(ValueError, match="is larger than the image"):
        T.RandomCrop((61, 10))(*sample())


def test_erasing_is_torchvisions():
    image, target = T.ToTensor()(*sample())
    erased, result = T.RandomErasing(p=1.0, value=9)(image, target)
    assert (erased == 9).any() and result is target
    first, second = (T.RandomErasing(1.0)(image, target, np.random.default_rng(5))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_objects_without_boxes_go_with_their_masks():
    target = {"masks": sample()[1]["masks"].repeat(2, 1, 1), "labels": torch.tensor([1, 2])}
    target["masks"][1] = False
    target["masks"][1, 59, 79] = True
    assert T.crop(sample()[0], target, (0, 0, 40, 60))[1]["labels"].tolist() == [1]


def test_the_published_pipeline_equals_ours():
    published = T.Compose([T.RandomResize([90], max_size=1333), T.Compose([
        T.ToTensor(), T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])])
    image, result = published(*sample())
    ours, expected = make_coco_transforms("val", val_size=90)(*sample())
    torch.testing.assert_close(image, ours, atol=1e-5, rtol=0)
    assert torch.equal(result["boxes"], expected["boxes"])


def test_global_state_decides_without_a_source():
    transform = T.Compose([T.RandomHorizontalFlip(), T.RandomSizeCrop(20, 60), T.RandomPad(9)])
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append([T.image_size(transform(*sample())[0]) for _ in range(5)])
    assert results[0] == results[1] and len(set(results[0])) > 1


def test_transforms_of_two_arguments_work_in_a_pipeline():
    def shift(image, target):
        assert isinstance(image, Image.Image)
        return image, {**target, "boxes": target["boxes"] + random.random()}

    class Own:
        def __call__(self, image, target, strength=3):
            assert strength == 3
            return shift(image, target)

    for own in (shift, Own(), T.RandomSelect(shift, shift), T.Compose([Own()])):
        image, target = T.Compose([T.RandomHorizontalFlip(0.0), own, T.ToTensor()])(*sample())
        assert image.shape == (3, 60, 80) and 10 < target["boxes"][0, 0] < 11
    assert adapt(T.ToTensor()) is not None and type(adapt(T.Normalize())) is T.Normalize


def test_data_sets_take_transforms_of_two_arguments(tmp_path):
    """Their samples are functions of seed, epoch and index too, whatever global state they draw from."""
    for number in (1, 2):
        Image.new("RGB", (80, 60), (51, 51, 51)).save(tmp_path / f"{number}.png")
    content = {"images": [{"id": number, "file_name": f"{number}.png", "width": 80, "height": 60} for number in (1, 2)],
               "categories": [{"id": 1, "name": "cat"}],
               "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 40, 20], "area": 800,
                                "iscrowd": 0}]}
    (tmp_path / "all.json").write_text(json.dumps(content))

    def own(image, target):
        assert image.size == (80, 60)
        return v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True), {
            **target, "draws": (random.random(), float(np.random.rand()), float(torch.rand(())))}

    for transforms in (own, T.Compose([T.RandomHorizontalFlip(), own])):
        dataset = CocoDetection(tmp_path, tmp_path / "all.json", transforms, False)
        random.seed(0)
        state = random.getstate()
        draws = [dataset[0][1]["draws"], dataset[1][1]["draws"]]
        assert draws[0] != draws[1] and dataset[0][1]["draws"] == draws[0] and random.getstate() == state
        dataset.set_epoch(1)
        assert dataset[0][1]["draws"] != draws[0]
    dataset.transforms = v2.RandomHorizontalFlip(1.0)
    image, target = dataset[0]
    assert image.size == (80, 60) and set(target) >= {"boxes", "labels", "image_id"}
