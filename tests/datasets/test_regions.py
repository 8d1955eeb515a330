"""The laws of the region pretext: which regions are proposed and chosen, and that boxes and crops show the same."""
import ctypes
import sys
import types

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from datasets import build_dataset, num_classes_and_names, objects_per_image
from datasets import transforms as T
from datasets.coco import training_augmentation
from datasets.patches import PatchAugmentation
from datasets.pretext import PretextDataset
from datasets.regions import RegionPretext, choose_regions
from datasets.selective_search import _group_all, draw_order, find_regions, require_opencv, selective_search
from region_scenes import arguments, write_scene
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import InputError
from util.misc import collate_fn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    for number in range(4):
        write_scene(root / f"n{number % 2}" / f"{number}.png", (96, 64) if number < 2 else (64, 96), seed=number)
    return root


def denormalise(image):
    mean, std = torch.tensor(T.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(T.IMAGENET_STD).view(3, 1, 1)
    return ((image * std + mean) * 255).round().to(torch.uint8)


# Proposals


def test_an_object_is_among_the_proposals():
    image = torch.full((3, 100, 200), 30, dtype=torch.uint8)
    image[0, 25:75, 50:150] = 230   # on the grid of 128 x 128: 32 ... 96 both ways
    proposals = selective_search(image)
    assert proposals.dtype == np.uint8 and proposals.shape[1] == 4
    assert np.abs(proposals.astype(int) - [32, 32, 96, 96]).max(1).min() <= 1
    assert len(np.unique(proposals, axis=0)) == len(proposals)
    assert (proposals[:, 2:] > proposals[:, :2]).all() and proposals.max() == 128


def test_an_image_without_structure_is_one_region():
    image = torch.full((3, 50, 70), 99, dtype=torch.uint8)
    assert selective_search(image).tolist() == [[0, 0, 128, 128]]
    assert find_regions(image).tolist() == [[0, 0, 128, 128, 1, 12]]   # in each of the twelve hierarchies


def smooth_noise(seed, size=(90, 120)):
    """Colours that change smoothly: for selective search, many regions of many levels."""
    coarse = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, 9, 9), dtype=np.uint8)).float()
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255).byte()[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_regions_levels_and_order_are_opencvs(seed):
    """OpenCV takes the ranks of its regions from the C library: given the same numbers, both put them in one order."""
    library = ctypes.CDLL(None)
    image = smooth_noise(seed)
    search = require_opencv().ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(F.resize(image, [128, 128], antialias=True).flip(0).permute(1, 2, 0).contiguous().numpy())
    search.switchToSelectiveSearchFast()
    library.srand(seed + 1)
    expected = search.process()
    expected[:, 2:] += expected[:, :2]

    regions = _group_all(image)
    library.srand(seed + 1)
    ranks = [library.rand() / (2**31 - 1) * level for *_, level in regions]
    boxes = list(dict.fromkeys(tuple(box) for _, (*box, _) in sorted(zip(ranks, regions), key=lambda pair: pair[0])))
    assert len(regions) > 200 and boxes == list(map(tuple, expected.tolist()))


def test_an_order_is_drawn_by_levels():
    """Of two regions of levels 1 and 4, the first comes first with probability 7/8; one that is there three times is
    as often first as three of its kind."""
    rng = np.random.default_rng(0)

    def share_of_first(*regions):
        regions = np.array(regions, dtype=np.uint8)
        return np.mean([draw_order(regions, rng)[0].tolist() == [0, 0, 1, 1] for _ in range(4000)])

    one = [0, 0, 1, 1, 1, 1]
    assert share_of_first(one, [0, 0, 2, 2, 4, 1]) == pytest.approx(7 / 8, abs=0.02)
    assert share_of_first([0, 0, 1, 1, 1, 3], [0, 0, 2, 2, 1, 1]) == pytest.approx(3 / 4, abs=0.02)
    assert share_of_first(one, [0, 0, 1, 1, 4, 1]) == 1 and len(draw_order(np.array([one, one]).astype("u1"), rng)) == 1
    assert draw_order(np.zeros((0, 6), dtype=np.uint8), rng).shape == (0, 4)


def test_each_visit_draws_its_own_regions_and_a_resumed_run_the_same(tmp_path):
    Image.fromarray(smooth_noise(3).permute(1, 2, 0).numpy()).save(tmp_path / "a.png")

    def visits(epochs):
        dataset = build_dataset("train", arguments(tmp_path, max_prop=30))
        dataset.pretext.transform = T.RandomResize([64], 96)
        found = []
        for epoch in epochs:
            dataset.set_epoch(epoch)
            found.append(set(map(tuple, dataset[0][1]["boxes"].tolist())))
        return found

    first, second, third = visits(range(3))
    assert len(first) == len(second) == 30
    assert 0 < len(first & second) < 25 and first != third
    assert visits([2]) == [third]


def test_what_is_missing_of_opencv_is_said(monkeypatch):
    require_opencv.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "cv2", None)
        with pytest.raises(InputError, match="^selective search needs OpenCV .*: pip install -r requirements/detreg"):
            require_opencv()
        plain = types.ModuleType("cv2")
        plain.__version__ = "4.11.0"
        patched.setitem(sys.modules, "cv2", plain)
        with pytest.raises(InputError, match="contrib modules, which the OpenCV 4.11.0 of this environment lacks"):
            require_opencv()
    assert hasattr(require_opencv(), "ximgproc")


# Strategies


def test_the_best_are_the_first():
    rng = np.random.default_rng(0)
    assert choose_regions("topk", 10, 3, rng).tolist() == [0, 1, 2]
    for strategy in ("topk", "random", "importance"):
        assert choose_regions(strategy, 4, 30, rng).tolist() == [0, 1, 2, 3]
        assert choose_regions(strategy, 4, 4, rng).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["random", "importance"])
def test_drawn_regions_are_different_and_in_order(strategy):
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = choose_regions(strategy, 12, 5, rng)
        assert len(chosen) == 5 and (np.diff(chosen) > 0).all() and 0 <= chosen[0] and chosen[-1] < 12


@pytest.mark.parametrize("strategy, expected", [
    ("random", [1 / 3, 1 / 3, 1 / 3]),
    ("importance", [0.7304, 0.2696, 0])])   # log 3, log 3 - log 2 and 0, over 2 log 3 - log 2
def test_how_often_a_region_is_drawn(strategy, expected):
    rng = np.random.default_rng(0)
    drawn = np.bincount([choose_regions(strategy, 3, 1, rng)[0] for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, expected, atol=0.025)   # three standard deviations of a third


# Samples


class Given:
    """A source of regions that a test chooses, for every image alike."""

    def __init__(self, *boxes):
        # All of level 0: the first of them comes first.
        self.regions = np.array([(*box, 0, 1) for box in boxes], dtype=np.uint8).reshape(-1, 6)

    def __call__(self, index, path, image):
        return self.regions


def dataset_of(root, files, source, transform, training=True, patch_size=16, augmented=False):
    pretext = RegionPretext(source, "topk", 30, transform)
    dataset = PretextDataset(root, files, pretext, training=training, patch_size=patch_size)
    if not augmented:
        dataset.augmentation = PatchAugmentation(jitter_p=0, grey_p=0, blur_p=0)
    return dataset


def test_boxes_and_crops_follow_the_object_through_the_augmentation(tmp_path):
    pixels = np.full((128, 192, 3), 20, dtype=np.uint8)
    pixels[32:64, 96:144] = [240, 0, 0]   # grid: x 64 ... 96, y 32 ... 64
    pixels[80:120, 12:48] = [0, 0, 240]   # grid: x 8 ... 32, y 80 ... 120
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = Given([64, 32, 96, 64], [8, 80, 32, 120])
    dataset = dataset_of(tmp_path, ["a.png"], source, training_augmentation([48, 64], 100, None, None))
    counts, on_the_left = set(), set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        shown = denormalise(image)
        height, width = image.shape[1:]
        counts.add(len(target["boxes"]))
        for box, patch, area in zip(target["boxes"], denormalise(target["patches"]), target["area"]):
            channel = int(patch.float().mean((1, 2)).argmax())
            x0, y0, x1, y1 = (box_cxcywh_to_xyxy(box) * torch.tensor([width, height, width, height])).tolist()
            assert area == pytest.approx((x1 - x0) * (y1 - y0), rel=1e-4)
            where = shown[channel] > 130
            rows, columns = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert all(abs(int(one) - other) <= 1.01 for one, other in zip(found, (x0, y0, x1, y1)))
            assert patch[channel].min() == 240 and patch[2 - channel].max() < 30   # whole, however much is cut away
            on_the_left.add((channel, (x0 + x1) / 2 < width / 2))
    assert {0, 1, 2} == counts or {1, 2} == counts   # crops cut objects away
    assert {(0, True), (0, False)} <= on_the_left    # and images are mirrored


def test_crops_are_cut_from_the_file_whole_unmirrored_and_in_their_order(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    grid = [[8 * number, 4 * number, 8 * number + 24, 4 * number + 40] for number in range(12)]
    dataset = dataset_of(tmp_path, ["a.png"], Given(*grid), training_augmentation([32, 40], 60, [48], [16, 24]))
    source, counts = torch.from_numpy(noise).permute(2, 0, 1), set()
    crops = [F.resize(source[:, 2 * y0:2 * y1, 5 * x0 // 2:-(-5 * x1 // 2)], [16, 16], antialias=True)
             for x0, y0, x1, y1 in grid]
    for epoch in range(12):
        dataset.set_epoch(epoch)
        left = iter(enumerate(crops))
        patches = denormalise(dataset[0][1]["patches"])
        for patch in patches:   # the crops of some of the regions, in their order
            assert any((patch.int() - crop.int()).abs().max() <= 1 for _, crop in left)
        counts.add(len(patches))
    assert len(counts) > 2 and max(counts) == 12


def test_crops_are_augmented_in_training_alone(folder):
    def crops(**settings):
        dataset = dataset_of(folder, ["n0/0.png"], Given([0, 0, 64, 64], [64, 32, 128, 128]), T.RandomResize([64], 96),
                             **settings)
        samples = []
        for epoch in (0, 1, 0):
            dataset.set_epoch(epoch)
            samples.append(dataset[0][1]["patches"])
        return samples

    plain, augmented = crops(augmented=True, training=False), crops(augmented=True)
    assert torch.equal(plain[0], plain[1]) and not torch.equal(augmented[0], plain[0])
    assert not torch.equal(augmented[0], augmented[1]) and torch.equal(augmented[0], augmented[2])


def test_crops_are_the_regions_of_their_boxes(folder):
    """In evaluation: the image as in the file, whole pixels around each box."""
    source = Given([0, 0, 64, 64], [64, 32, 128, 128])
    dataset = dataset_of(folder, ["n0/0.png"], source, T.RandomResize([64], 96), training=False)
    image, target = dataset[0]
    shown = denormalise(image)
    assert torch.equal(shown, torch.from_numpy(np.array(Image.open(folder / "n0/0.png"))).permute(2, 0, 1))
    for patch, (x0, y0, x1, y1) in zip(denormalise(target["patches"]), [(0, 0, 48, 32), (48, 16, 96, 64)], strict=True):
        expected = F.resize(shown[:, y0:y1, x0:x1], [16, 16], antialias=True)
        assert (patch.int() - expected.int()).abs().max() <= 1
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.625, 0.5, 0.75]]))
    assert target["area"].tolist() == [48 * 32, 48 * 48]


def test_targets(folder):
    dataset = build_dataset("train", arguments(folder, max_prop=3))
    image, target = dataset[2]
    count, size = len(target["boxes"]), list(image.shape[1:])
    assert 0 < count <= 3 and image.dtype == target["patches"].dtype == torch.float32
    assert {name: (list(value.shape), value.dtype) for name, value in target.items()} == {
        "image_id": ([1], torch.int64), "labels": ([count], torch.int64), "boxes": ([count, 4], torch.float32),
        "area": ([count], torch.float32), "iscrowd": ([count], torch.int64), "orig_size": ([2], torch.int64),
        "size": ([2], torch.int64), "patches": ([count, 3, 24, 24], torch.float32)}
    assert target["labels"].tolist() == [1] * count and target["iscrowd"].tolist() == [0] * count
    assert target["orig_size"].tolist() == [64, 96] and target["size"].tolist() == size
    assert target["image_id"].tolist() == [2]
    corners = box_cxcywh_to_xyxy(target["boxes"])
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert num_classes_and_names(arguments(folder)) == (91, {1: "region"})
    assert num_classes_and_names(arguments(folder, num_classes=2))[0] == 2 and objects_per_image(dataset) is None


def test_published_sizes_are_the_default(tmp_path):
    write_scene(tmp_path / "a.png", (300, 200))
    args = arguments(tmp_path, pretrain_sizes=None, pretrain_max_size=None)
    whole = build_dataset("val", args)[0][0]
    assert list(whole.shape[1:]) == [400, 600]   # 480 would make it 720 wide
    dataset = build_dataset("train", args)
    sides = set()
    for epoch in range(6):
        dataset.set_epoch(epoch)
        sides.add(min(dataset[0][0].shape[1:]))
    assert len(sides) > 1 and all(side <= 480 for side in sides)


def test_published_crops_are_the_default(folder):
    """Those of detection, also where images are shown smaller."""
    for changes, sizes, sides in (({}, [400, 500, 600], (384, 600)),
                                  ({"crop_resize": [50, 70], "crop_size": [30, 60]}, [50, 70], (30, 60))):
        _, choice = build_dataset("train", arguments(folder, **changes)).pretext.transform.transforms
        resize, crop, _ = choice.second.transforms
        assert resize.sizes == sizes and (crop.min_size, crop.max_size) == sides


def test_a_crop_that_loses_every_region_leaves_an_empty_target(folder):
    class CutAway:
        def __call__(self, image, target, rng):
            return T.crop(image, target, (0, 0, 8, 8))

    dataset = dataset_of(folder, ["n0/0.png"], Given([64, 64, 128, 128], [100, 64, 128, 128]), CutAway())
    _, target = dataset[0]
    assert target["patches"].shape == (0, 3, 16, 16) and target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def test_an_image_that_shows_nothing_is_replaced(folder, tmp_path):
    Image.new("RGB", (64, 64), (90, 80, 70)).save(tmp_path / "a.png")
    write_scene(tmp_path / "b.png")
    dataset = build_dataset("train", arguments(tmp_path))
    assert dataset[0][1]["image_id"].tolist() == [1]
    assert dataset.unsuited == ["a.png"] and dataset.unreadable == []
    (tmp_path / "b.png").unlink()
    with pytest.raises(InputError, match="of 1, 0 cannot be read and 1 are too small or show nothing"):
        build_dataset("train", arguments(tmp_path))[0]


def test_unreadable_files_are_replaced(tmp_path, capfd):
    (tmp_path / "a.png").write_bytes(b"no image")
    write_scene(tmp_path / "b.png")
    dataset = build_dataset("train", arguments(tmp_path))
    assert dataset[0][1]["image_id"].tolist() == [1] and dataset.unreadable == ["a.png"]
    assert "passed over" in capfd.readouterr().err


@pytest.mark.parametrize("image_set", ["train", "val"])
def test_samples_depend_on_seed_epoch_and_index_not_on_workers(folder, image_set):
    args = arguments(folder, strategy="random", max_prop=2)

    def batches(num_workers):
        dataset = build_dataset(image_set, args)
        loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=collate_fn,
                            persistent_workers=num_workers > 0)
        found = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            found += list(loader)
        return found

    reference = batches(0)
    for (images, targets), other in zip(reference, batches(2), strict=True):
        assert torch.equal(images.tensors, other[0].tensors)
        assert all(torch.equal(one[name], two[name]) for one, two in zip(targets, other[1]) for name in one)
    same = all(torch.equal(one["boxes"], two["boxes"]) for (_, first), (_, second) in zip(reference[:2], reference[2:])
               for one, two in zip(first, second) if one["boxes"].shape == two["boxes"].shape)
    assert same == (image_set == "val")   # evaluation shows the same in every epoch


def test_one_image_is_enough_to_evaluate_on(tmp_path):
    write_scene(tmp_path / "a.png")
    image, target = build_dataset("val", arguments(tmp_path))[0]
    assert "control_patches" not in target and len(target["patches"]) == len(target["boxes"]) > 0


def test_senseless_flags_are_refused(folder):
    for changes, message in (({"strategy": "best"}, "--strategy best is not one of topk, random, importance"),
                             ({"max_prop": 0}, "--max_prop 0 must be at least 1"),
                             ({"pretrain_sizes": [8]}, "--pretrain_sizes 8 must be at least 16"),
                             ({"crop_resize": [0, 32]}, "--crop_resize 0 must be at least 1"),
                             ({"crop_size": [0, 0]}, "--crop_size 0 must be at least 1")):
        with pytest.raises(InputError, match=f"^{message}$"):
            build_dataset("train", arguments(folder, **changes))


# Lists of classes


def test_a_list_of_classes(folder, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("# half of them\nn1 the second class\n\n")
    assert list(build_dataset("train", arguments(folder, class_list=str(listed))).files) == ["n1/1.png", "n1/3.png"]
    for content, message in (("n1\nn7\nn8\n", "2 of its 3 classes have no images in .*, the first is n7$"),
                             ("\n", "names no classes$")):
        listed.write_text(content)
        with pytest.raises(InputError, match=f"^--class_list .*{message}"):
            build_dataset("train", arguments(folder, class_list=str(listed)))
    with pytest.raises(InputError, match="^--class_list nowhere does not exist"):
        build_dataset("train", arguments(folder, class_list="nowhere"))
