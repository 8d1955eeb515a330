"""The laws of the pretext: where patches come from, how they are augmented, and what becomes of files of no use."""
import argparse
import os
import time

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from datasets import build_dataset, num_classes_and_names
from datasets import transforms as T
from datasets.patches import PatchAugmentation, PatchParameters, augment_patches, cut_patches, normalize_patches
from datasets.pretext import PatchPretext, PretextDataset, RandomPatches, is_held_out, list_images
from util.box_ops import box_cxcywh_to_xyxy
from util.errors import InputError
from util.misc import collate_fn


def write_image(path, size=(60, 40), mode="RGB", seed=0):
    """Writes an image of noise; PNG keeps it exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Six images, of 60 x 40 and 40 x 60."""
    for number in range(6):
        write_image(tmp_path / f"n{number % 2}" / f"{number}.png", (60, 40) if number < 3 else (40, 60), seed=number)
    return tmp_path


def arguments(root, **changes):
    values = dict(dataset_file="imagenet", imagenet_path=str(root), imagenet_val_path=None, held_out_share=0.0,
                  class_list=None, num_patches=4, min_patch=8, max_patch=None, patch_size=24, pretrain_sizes=[32, 40],
                  pretrain_max_size=60, seed=0)
    return argparse.Namespace(**{**values, **changes})


def denormalise(image):
    """Back to bytes, from normalised floats."""
    mean, std = torch.tensor(T.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(T.IMAGENET_STD).view(3, 1, 1)
    return ((image * std + mean) * 255).round().to(torch.uint8)


# Boxes


def test_random_patches_keep_their_bounds_and_reach_every_edge():
    image, rng = torch.zeros(3, 40, 30, dtype=torch.uint8), np.random.default_rng(0)
    boxes = torch.cat([RandomPatches(10)(image, rng) for _ in range(1000)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.amin(0).tolist() == [8, 8] and sides.amax(0).tolist() == [22, 32]   # side - 8
    assert boxes.amin(0).tolist()[:2] == [0, 0] and boxes.amax(0).tolist()[2:] == [30, 40]
    counts = torch.bincount(sides[:, 0])[8:]
    assert counts.min() > 0.8 * counts.float().mean()   # uniform: 667 each, give or take 26


def test_random_patches_between_given_sides():
    image, rng = torch.zeros(3, 128, 120, dtype=torch.uint8), np.random.default_rng(0)
    boxes = torch.cat([RandomPatches(10, 16, 96)(image, rng) for _ in range(500)])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() == 16 and sides.max() == 96
    assert RandomPatches(10, 16)(image[:, :31], rng) is None
    assert len(RandomPatches(10, 16)(image[:, :32], rng)) == 10


@pytest.mark.parametrize("numbers, message", [
    ((0,), "--num_patches 0"), ((5, 0), "--min_patch 0"), ((5, 16, 15), "--max_patch 15 is less than --min_patch 16")])
def test_senseless_patches_are_refused(numbers, message):
    with pytest.raises(InputError, match=message):
        RandomPatches(*numbers)


# Samples


def test_unaugmented_patches_are_the_regions_of_their_boxes(folder):
    dataset = build_dataset("val", arguments(folder, pretrain_sizes=[40]))
    for index in range(len(dataset)):
        image, patches, target = dataset[index]
        shown = denormalise(image)
        source = torch.from_numpy(np.array(Image.open(folder / dataset.files[index]))).permute(2, 0, 1)
        assert torch.equal(shown, source)
        scale = torch.tensor([image.shape[2], image.shape[1]] * 2)
        boxes = (box_cxcywh_to_xyxy(target["boxes"]) * scale).round().int().tolist()
        for patch, (x0, y0, x1, y1) in zip(denormalise(patches), boxes):
            expected = F.resize(shown[:, y0:y1, x0:x1], [24, 24], antialias=True)
            assert (patch.int() - expected.int()).abs().max() <= 1


def checkerboard(path, size=(400, 240)):
    """Writes an image of black and white squares of one pixel, of which nothing is left where it is shown smaller."""
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    Image.fromarray(((x + y) % 2 * 255).astype(np.uint8)).convert("RGB").save(path)


def test_patches_are_cut_from_the_file_not_from_the_image_as_shown(tmp_path):
    for name in "ab":
        checkerboard(tmp_path / f"{name}.png")
    args = arguments(tmp_path, max_patch=24, pretrain_sizes=[60], pretrain_max_size=100)
    image, patches, target = build_dataset("val", args)[0]
    source = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)
    assert image.shape[1:] == (60, 100) and denormalise(image).float().std() < 20
    boxes = (box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([400, 240, 400, 240])).round().int()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 8 and sides.max() <= 24   # pixels of the file
    torch.testing.assert_close(target["area"], sides.prod(1) / 16.0)   # pixels of the image
    for patch, (x0, y0, x1, y1) in zip(denormalise(patches), boxes.tolist()):
        expected = F.resize(source[:, y0:y1, x0:x1], [24, 24], antialias=True)
        assert (patch.int() - expected.int()).abs().max() <= 1 and patch.float().std() > 30


def test_large_photographs_keep_their_detail(tmp_path):
    """They could be decoded at a part of their size, were it for the image alone."""
    for name in "ab":
        write_image(tmp_path / f"{name}.jpg", (800, 640))
    image, patches, target = build_dataset("val", arguments(tmp_path, max_patch=24, pretrain_max_size=None))[0]
    source = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).permute(2, 0, 1)
    assert image.shape[1:] == (40, 50) and target["orig_size"].tolist() == [640, 800]
    boxes = (box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([800, 640, 800, 640])).round().int().tolist()
    for patch, (x0, y0, x1, y1) in zip(denormalise(patches), boxes):
        expected = F.resize(source[:, y0:y1, x0:x1], [24, 24], antialias=True)
        assert (patch.int() - expected.int()).abs().max() <= 1


def test_patches_of_their_own_size_are_copied_exactly():
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    patches = cut_patches(image, torch.tensor([[0, 0, 16, 16], [44, 24, 60, 40]]), 16)
    assert torch.equal(patches[0], image[:, :16, :16]) and torch.equal(patches[1], image[:, 24:, 44:])


def test_targets(folder):
    dataset = build_dataset("train", arguments(folder))
    image, patches, target = dataset[1]
    height, width = image.shape[1:]
    assert min(height, width) in (32, 40) and max(height, width) <= 60
    assert patches.shape == (4, 3, 24, 24) and patches.dtype == image.dtype == torch.float32
    assert target["labels"].tolist() == [1] * 4 and target["iscrowd"].tolist() == [0] * 4
    assert target["orig_size"].tolist() == [40, 60] and target["size"].tolist() == [height, width]
    assert target["image_id"].tolist() == [1]
    torch.testing.assert_close(target["area"], target["boxes"][:, 2:].prod(1) * height * width)
    corners = box_cxcywh_to_xyxy(target["boxes"])
    assert corners.min() >= -1e-6 and corners.max() <= 1 + 1e-6
    assert "control_patches" not in target
    assert num_classes_and_names(arguments(folder)) == (2, {1: "patch"})


def test_published_sizes_are_the_default(tmp_path):
    write_image(tmp_path / "a.jpg", (300, 200))
    dataset = build_dataset("train", arguments(tmp_path, pretrain_sizes=None, pretrain_max_size=None))
    heights = set()
    for epoch in range(40):
        dataset.set_epoch(epoch)
        heights.add(tuple(dataset[0][0].shape[1:]))
    # 300 / 200 = 1.5: 320 … 400 give 480 … 600; above, the long side is held at 600.
    assert {height for height, _ in heights} == {320, 336, 352, 368, 384, 400}
    assert all(width == int(height * 1.5) for height, width in heights)


def test_training_samples_depend_on_seed_epoch_and_index(folder):
    dataset = build_dataset("train", arguments(folder))
    first = dataset[0]
    assert all(torch.equal(a, b) for a, b in zip(first[:2], dataset[0][:2]))
    dataset.set_epoch(1)
    assert not torch.equal(dataset[0][1], first[1])
    dataset.set_epoch(0)
    assert torch.equal(dataset[0][2]["boxes"], first[2]["boxes"])
    assert not torch.equal(build_dataset("train", arguments(folder, seed=1))[0][2]["boxes"], first[2]["boxes"])


@pytest.mark.parametrize("image_set", ["train", "val"])
def test_batches_do_not_depend_on_the_workers(folder, image_set):
    def batches(num_workers):
        dataset = build_dataset(image_set, arguments(folder))
        loader = DataLoader(dataset, batch_size=3, num_workers=num_workers, collate_fn=collate_fn,
                            persistent_workers=num_workers > 0)
        found = []
        for epoch in range(2):
            dataset.set_epoch(epoch)
            found += list(loader)
        return found

    reference = batches(0)
    for num_workers in (1, 2):
        for (images, patches, targets), other in zip(reference, batches(num_workers), strict=True):
            assert torch.equal(images.tensors, other[0].tensors) and torch.equal(patches, other[1])
            assert all(torch.equal(one[name], two[name]) for one, two in zip(targets, other[2]) for name in one)


def test_evaluation_is_the_same_in_every_epoch_and_not_augmented(folder):
    dataset = build_dataset("val", arguments(folder))
    image, patches, target = dataset[2]
    assert image.shape[1:] == (60, 40)   # the largest of the sizes
    dataset.set_epoch(7)
    again = dataset[2]
    assert torch.equal(image, again[0]) and torch.equal(patches, again[1])
    assert torch.equal(target["control_patches"], again[2]["control_patches"])


def test_control_patches_come_from_the_image_half_a_data_set_away(folder):
    dataset = build_dataset("val", arguments(folder))
    for index in range(6):
        assert torch.equal(dataset[index][2]["control_patches"], dataset[(index + 3) % 6][1])


def test_evaluation_needs_two_images(tmp_path):
    write_image(tmp_path / "a.png")
    with pytest.raises(InputError, match="needs two images"):
        build_dataset("val", arguments(tmp_path))


# Files


def test_listing_takes_images_only_and_follows_links(tmp_path):
    root = tmp_path / "root"
    for name in ("b/2.JPEG", "b/deep/er/1.png", "a.jpg", "c/.hidden.jpg"):
        write_image(root / name) if name[-1] == "g" else write_image(root / "b/x.jpg").rename(root / name)
    (root / "notes.txt").write_text("no image")
    write_image(tmp_path / "elsewhere/7.webp")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b/deep/loop").symlink_to(root)
    (root / "again").symlink_to(tmp_path / "elsewhere")
    (root / "single.png").symlink_to(root / "b/deep/er/1.png")
    assert list_images(root) == ["a.jpg", "again/7.webp", "b/2.JPEG", "b/deep/er/1.png", "single.png"]


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="image folder .*nowhere does not exist"):
        build_dataset("train", arguments(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has no images .*jpg"):
        build_dataset("train", arguments(tmp_path))
    with pytest.raises(InputError, match="--imagenet_path is needed"):
        build_dataset("train", arguments(""))


def test_held_out_share_splits_by_name(tmp_path):
    for number in range(200):
        (tmp_path / f"{number}.jpg").touch()
    args = arguments(tmp_path, held_out_share=0.2)
    train, val = (list(build_dataset(part, args).files) for part in ("train", "val"))
    assert sorted(train + val) == list_images(tmp_path) and not set(train) & set(val)
    assert 20 < len(val) < 60   # 40, give or take three standard deviations of 5.7
    for number in range(200, 300):
        (tmp_path / f"{number}.jpg").touch()
    assert set(val) <= set(build_dataset("val", args).files) and set(train) <= set(build_dataset("train", args).files)
    assert is_held_out("5.jpg", 1.0) and not is_held_out("5.jpg", 0.0)
    with pytest.raises(InputError, match="--held_out_share 1.5 must be less than 1"):
        build_dataset("train", arguments(tmp_path, held_out_share=1.5))
    with pytest.raises(InputError, match="--held_out_share 1e-09 of .* leaves no images to hold out"):
        build_dataset("val", arguments(tmp_path, held_out_share=1e-9))


def test_a_folder_of_its_own_to_hold_out(folder, tmp_path):
    other = tmp_path / "n0"
    args = arguments(folder, imagenet_val_path=str(other), held_out_share=0.5)
    assert len(build_dataset("train", args)) == 6 and len(build_dataset("val", args)) == 3


@pytest.mark.parametrize("mode, name", [
    ("L", "grey.png"), ("LA", "grey.png"), ("RGBA", "alpha.png"), ("P", "palette.png"), ("CMYK", "print.jpg"),
    ("I;16", "deep.png"), ("1", "bits.png")])
def test_every_kind_of_image_is_taken(tmp_path, mode, name):
    if mode == "I;16":
        Image.fromarray(np.full((40, 60), 30000, dtype=np.uint16)).save(tmp_path / name)
    else:
        write_image(tmp_path / name, mode=mode)
    image, patches, _ = build_dataset("train", arguments(tmp_path))[0]
    assert image.shape[0] == 3 and torch.isfinite(patches).all()


def test_unreadable_files_are_reported_once_and_replaced_by_the_next(folder, capfd):
    bad = folder / "n0/0.png"
    bad.write_bytes(b"\x89PNG broken")
    dataset = build_dataset("train", arguments(folder))
    image, _, target = dataset[0]
    assert torch.equal(image, dataset[1][0]) and target["image_id"].tolist() == [1]
    dataset.set_epoch(1)
    dataset[0]
    assert dataset.unreadable == ["n0/0.png"] == dataset.gather_unreadable()
    reports = [line for line in capfd.readouterr().err.splitlines() if str(bad) in line]
    assert len(reports) == 1 and reports[0].startswith(f"passed over: image file {bad} cannot be decoded")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_main_process_knows_what_workers_could_not_read(folder, num_workers):
    (folder / "n1/3.png").write_bytes(b"")
    dataset = build_dataset("train", arguments(folder))
    assert dataset.unreadable == []
    assert len(list(DataLoader(dataset, num_workers=num_workers, collate_fn=collate_fn))) == 6
    assert dataset.unreadable == ["n1/3.png"]


def test_too_many_unreadable_files_stop_the_run(folder):
    for name in ("n0/0.png", "n1/1.png"):
        (folder / name).write_bytes(b"")
    dataset = build_dataset("train", arguments(folder))
    message = "2 of the 6 images of .* cannot be read, which is more than 1%; the latest: .*1.png"
    with pytest.raises(InputError, match=message):
        [dataset[index] for index in range(6)]


def test_one_in_a_hundred_may_be_unreadable(tmp_path):
    write_image(tmp_path / "good.png")
    for number in range(2):
        (tmp_path / f"bad{number}.png").write_bytes(b"")
    pretext = PatchPretext(RandomPatches(2), [32])
    files = [f"bad{number}.png" for number in range(2)] + ["good.png"]
    small = PretextDataset(tmp_path, files + ["good.png"] * 197, pretext, training=True, patch_size=8)
    assert small[0][2]["image_id"].tolist() == [2] and len(small.unreadable) == 2   # 2 of 200 are not more than 1 %
    smaller = PretextDataset(tmp_path, files + ["good.png"] * 196, pretext, training=True, patch_size=8)
    with pytest.raises(InputError, match="2 of the 199 images"):
        smaller[0]


def test_small_images_are_passed_over(folder):
    write_image(folder / "n0/0.png", (15, 100))
    write_image(folder / "n1/1.png", (1000, 40))   # 60 x 2 once its long side is at most 60
    dataset = build_dataset("train", arguments(folder))
    assert dataset[0][2]["image_id"].tolist() == [1]   # "n0/2.png"
    dataset[3]
    assert dataset.unsuited == ["n0/0.png", "n1/1.png"] and dataset.unreadable == []


def test_a_folder_without_any_usable_image_is_refused(tmp_path):
    for number in range(3):
        write_image(tmp_path / f"{number}.png", (10, 10))
    with pytest.raises(InputError, match="usable images: of 3, 0 cannot be read and 3 are too small or show nothing"):
        build_dataset("train", arguments(tmp_path))[0]


def test_control_patches_avoid_the_image_itself(tmp_path):
    for number in range(2):
        write_image(tmp_path / f"{number}.png", seed=number)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match="too few usable images"):
        build_dataset("val", arguments(tmp_path))[0]


# Augmentation


def photographs(count=12, size=64):
    """Smooth coloured images with some noise, uint8 [count, 3, size, size]; also a grey, a black and a white one."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    images = (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1).mul(255).to(torch.uint8)
    images[0] = images[0, :1]
    images[1], images[2] = 0, 255
    return images


def parameters(count, jitter=False, kind=None, factor=0.0, grey=False, sigma=0.0):
    factors = np.tile(np.array([1, 1, 1, 0], dtype=np.float32), (count, 1))
    if kind is not None:
        factors[:, kind] = factor
    return PatchParameters(np.full(count, jitter), np.tile(np.arange(4), (count, 1)), factors, np.full(count, grey),
                           np.full(count, sigma, dtype=np.float32))


def levels_apart(ours, expected):
    """Largest difference in levels of 255 between floats in 0..1 and bytes or floats of torchvision."""
    expected = expected.float() / 255 if expected.dtype == torch.uint8 else expected
    return float((ours - expected).abs().max()) * 255


REFERENCES = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]


@pytest.mark.parametrize("kind, factor", [(kind, factor) for kind in range(3) for factor in (0.6, 0.93, 1.0, 1.4)]
                         + [(3, turns) for turns in (-0.1, -0.03, 0.0, 0.07, 0.1)])
def test_each_colour_change_is_torchvisions(kind, factor):
    images = photographs()
    ours = augment_patches(images, parameters(len(images), True, kind, factor))
    for patch, image in zip(ours, images):
        assert levels_apart(patch, REFERENCES[kind](image, factor)) <= 1.5              # torchvision rounds bytes
        assert levels_apart(patch, REFERENCES[kind](image.float() / 255, factor)) <= 0.1


def test_grey_is_torchvisions():
    images = photographs()
    ours = augment_patches(images, parameters(len(images), grey=True))
    assert levels_apart(ours, F.rgb_to_grayscale(images, num_output_channels=3)) <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.4, 1.0, 1.57, 2.0])
def test_blur_is_torchvisions_with_a_kernel_of_three_deviations(sigma):
    images = photographs()
    ours = augment_patches(images, parameters(len(images), sigma=sigma))
    length = 2 * max(round(3 * sigma), 1) + 1
    assert levels_apart(ours, F.gaussian_blur(images.float() / 255, [length, length], [sigma, sigma])) <= 0.1
    assert levels_apart(ours, F.gaussian_blur(images, [13, 13], [sigma, sigma])) <= 2


def augment_by_torchvision(image, drawn, index):
    """The changes drawn for one patch (float 0..1) by torchvision's functions."""
    if drawn.jitter[index]:
        for kind in drawn.order[index]:
            image = REFERENCES[kind](image, float(drawn.factors[index, kind]))
    if drawn.grey[index]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if drawn.sigma[index] > 0:
        image = F.gaussian_blur(image, [13, 13], [float(drawn.sigma[index])] * 2)
    return image


def test_whole_augmentation_patch_by_patch():
    images = photographs(40)
    drawn = PatchAugmentation().draw(40, np.random.default_rng(5))
    ours = augment_patches(images, drawn)
    for index, image in enumerate(images.float() / 255):
        assert levels_apart(ours[index], augment_by_torchvision(image, drawn, index)) <= 1
    assert ours.min() >= -1e-6 and ours.max() <= 1 + 1e-6


def test_augmentation_is_much_cheaper_than_torchvisions():
    """This is the hot path of pre-training: measured, less than a fifth of the time; half is asked for."""
    images, drawn = photographs(10, 128), PatchAugmentation().draw(10, np.random.default_rng(2))

    def shortest(program):
        times = []
        for _ in range(7):
            start = time.process_time()
            program()
            times.append(time.process_time() - start)
        return min(times)

    def patch_by_patch():
        for index, image in enumerate(images.float() / 255):
            augment_by_torchvision(image, drawn, index)

    assert shortest(lambda: augment_patches(images, drawn)) < shortest(patch_by_patch) / 2


def test_augmentation_is_drawn_as_in_the_paper():
    count = 20000
    drawn = PatchAugmentation().draw(count, np.random.default_rng(0))
    assert drawn.jitter.mean() == pytest.approx(0.8, abs=0.01)
    assert drawn.grey.mean() == pytest.approx(0.2, abs=0.01)
    assert (drawn.sigma > 0).mean() == pytest.approx(0.5, abs=0.015)
    blurred = drawn.sigma[drawn.sigma > 0]
    assert 0.1 <= blurred.min() < 0.11 and 1.99 < blurred.max() <= 2
    for kind, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
        assert low <= drawn.factors[:, kind].min() < low + 0.01 and high - 0.01 < drawn.factors[:, kind].max() <= high
    orders = {tuple(order) for order in drawn.order}
    assert len(orders) == 24


def test_a_patch_does_not_depend_on_the_others():
    images = photographs()
    drawn = PatchAugmentation().draw(len(images), np.random.default_rng(1))
    alone = PatchParameters(*(values[5:6] for values in vars(drawn).values()))
    assert torch.equal(augment_patches(images, drawn)[5], augment_patches(images[5:6], alone)[0])


def test_small_patches_can_be_blurred():
    images = photographs(3, 64)[:, :, :4, :4].contiguous()
    assert torch.isfinite(augment_patches(images, parameters(3, sigma=2.0))).all()


def test_normalisation_of_patches_is_that_of_images():
    images = photographs()
    torch.testing.assert_close(normalize_patches(images.float() / 255), T.normalize_image(images), atol=1e-5, rtol=0)


def test_names_of_any_bytes_survive(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_image(tmp_path / "x.png").rename(tmp_path / name)
    dataset = build_dataset("train", arguments(tmp_path))
    assert list(dataset.files) == [name] and dataset[0][0].shape[0] == 3


@pytest.mark.parametrize("image_set", ["train", "val"])
def test_overfitting_shows_the_first_images_with_the_same_patches(folder, image_set):
    dataset = build_dataset(image_set, arguments(folder, overfit=3))
    assert len(dataset) == 3
    image, patches, target = dataset[2]
    assert target["image_id"].tolist() == [2] and target["control_patches"].shape == patches.shape
    dataset.set_epoch(7)
    assert torch.equal(dataset[2][1], patches) and torch.equal(dataset[2][0], image)
    with pytest.raises(InputError, match="--overfit 7 is more than the 6 images of"):
        build_dataset(image_set, arguments(folder, overfit=7))
    with pytest.raises(InputError, match="--overfit 1: a pre-training needs two images at least"):
        build_dataset(image_set, arguments(folder, overfit=1))
