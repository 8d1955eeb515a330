"""Transforms against boxes computed by hand, and samples that do not depend on who loads them."""
import numpy as np
import pytest
import torch
from PIL import Image

from datasets import transforms as T
from datasets.coco import make_coco_transforms
from datasets.image_io import UnreadableImage, pil_to_rgb_tensor, read_image


class Fixed:
    """A random source that gives the numbers it is told to."""

    def __init__(self, randoms=(), integers=()):
        self._randoms, self._integers = list(randoms), list(integers)

    def random(self):
        return self._randoms.pop(0)

    def integers(self, low, high=None, endpoint=False):
        value = self._integers.pop(0)
        first, end = (0, low) if high is None else (low, high + endpoint)
        assert first <= value < end
        return value


def make_sample(height=40, width=60, boxes=((10, 5, 30, 25), (40, 20, 60, 40)), seed=0):
    """An image of noise with boxes, and masks that fill the boxes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    sides = boxes[:, 2:] - boxes[:, :2]
    return image, {"boxes": boxes, "labels": torch.arange(1, len(boxes) + 1), "area": sides.prod(1),
                   "iscrowd": torch.zeros(len(boxes), dtype=torch.int64), "masks": masks,
                   "size": torch.tensor([height, width])}


@pytest.mark.parametrize("height, width, size, max_size, expected", [
    (480, 640, 800, 1333, (800, 1066)),     # int(800 * 640 / 480) = int(1066.67)
    (640, 480, 800, 1333, (1066, 800)),
    (427, 640, 800, 1333, (800, 1199)),     # int(1199.06)
    (300, 1000, 800, 1333, (400, 1333)),    # round(1333 * 0.3) = round(399.9), int(400 * 10 / 3)
    (375, 500, 480, None, (480, 640)),
    (100, 1000, 400, None, (400, 4000)),    # no limit on the long side
    (375, 500, 480, 600, (450, 600)),
    (333, 500, 480, 600, (400, 600)),       # round(399.6), int(600.6)
    (128, 128, 128, 128, (128, 128)),
    (2, 1000, 320, 600, (1, 500)),          # round(1.2) = 1, never 0
])
def test_size_rule(height, width, size, max_size, expected):
    assert T.resized_size(height, width, size, max_size) == expected


def test_flip_mirrors_boxes_and_masks():
    image, target = make_sample()
    flipped, result = T.hflip(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert result["boxes"].tolist() == [[30, 5, 50, 25], [0, 20, 20, 40]]
    assert torch.equal(result["masks"], target["masks"].flip(-1))
    assert torch.equal(result["area"], target["area"])


def test_resize_scales_boxes_areas_and_masks():
    image, target = make_sample()
    resized, result = T.resize(image, target, 80)
    assert resized.shape == (3, 80, 120) and resized.dtype == torch.uint8
    assert result["boxes"].tolist() == [[20, 10, 60, 50], [80, 40, 120, 80]]
    assert result["area"].tolist() == [1600, 1600]
    assert result["size"].tolist() == [80, 120]
    assert torch.equal(result["masks"], target["masks"].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert target["boxes"].tolist()[0] == [10, 5, 30, 25]


def test_resize_scales_each_axis_by_its_own_rounded_factor():
    image, target = make_sample(30, 45, [(9, 6, 18, 12)])
    _, result = T.resize(image, target, 20, 29)   # 45 / 30 * 20 = 30 > 29: short = round(29 * 2 / 3) = 19, long = 28
    assert result["size"].tolist() == [19, 28]
    torch.testing.assert_close(result["boxes"], torch.tensor([[9 * 28 / 45, 6 * 19 / 30, 18 * 28 / 45, 12 * 19 / 30]]))
    torch.testing.assert_close(result["area"], torch.tensor([54 * (28 / 45) * (19 / 30)]))


def test_resize_is_pillows_antialiased_bilinear_up_to_rounding():
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    ours = T.resize_to(torch.from_numpy(noise).permute(2, 0, 1), (33, 44)).permute(1, 2, 0).numpy()
    pillows = np.asarray(Image.fromarray(noise).resize((44, 33), Image.BILINEAR))
    assert np.abs(ours.astype(int) - pillows.astype(int)).max() <= 1


def test_crop_clips_boxes_and_drops_what_vanishes_from_every_field():
    image, target = make_sample()
    cropped, result = T.crop(image, target, (10, 20, 20, 20))   # rows 10..30, columns 20..40
    assert torch.equal(cropped, image[:, 10:30, 20:40])
    assert result["boxes"].tolist() == [[0, 0, 10, 15]]         # the second box only touches the crop's edge
    assert result["area"].tolist() == [150]
    assert result["labels"].tolist() == [1]
    assert len(result["iscrowd"]) == 1 and result["masks"].shape == (1, 20, 20)
    assert result["masks"].sum() == 150
    assert result["size"].tolist() == [20, 20]


def test_images_without_objects_pass_through_everything():
    image, target = make_sample(boxes=())
    image, result = make_coco_transforms("train", train_sizes=[64])(image, target, np.random.default_rng(0))
    height, width = image.shape[-2:]
    assert result["boxes"].shape == (0, 4) and result["masks"].shape == (0, height, width)


def test_crop_sides_lie_in_their_range_and_reach_every_edge():
    image, _ = make_sample(50, 70, ())
    crop, rng = T.RandomSizeCrop(20, 60), np.random.default_rng(0)
    marked = torch.arange(50 * 70, dtype=torch.int32).view(1, 50, 70).expand(3, -1, -1)
    heights, widths, first, last = set(), set(), set(), set()
    for _ in range(3000):
        cropped, _ = crop(marked, None, rng)
        heights.add(cropped.shape[1])
        widths.add(cropped.shape[2])
        first.update(divmod(int(cropped[0, 0, 0]), 70))
        last.add(int(cropped[0, -1, -1]))
    assert (min(heights), max(heights)) == (20, 50) and (min(widths), max(widths)) == (20, 60)
    assert 0 in first and any(index % 70 == 69 for index in last) and any(index // 70 == 49 for index in last)


def test_crop_larger_than_the_image_keeps_the_image():
    image, target = make_sample()
    cropped, result = T.RandomSizeCrop(384, 600)(image, target, np.random.default_rng(0))
    assert torch.equal(cropped, image) and torch.equal(result["boxes"], target["boxes"])


def test_normalisation_and_relative_boxes():
    image, target = make_sample()
    normalised, result = T.Normalize()(image, target, None)
    mean, std = torch.tensor(T.IMAGENET_MEAN).view(3, 1, 1), torch.tensor(T.IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(normalised, (image.double() / 255 - mean).div(std).float(), atol=1e-5, rtol=0)
    assert normalised.is_contiguous()
    torch.testing.assert_close(result["boxes"], torch.tensor([[20 / 60, 15 / 40, 20 / 60, 20 / 40],
                                                              [50 / 60, 30 / 40, 20 / 60, 20 / 40]]))
    assert target["boxes"].tolist()[0] == [10, 5, 30, 25]


def test_training_pipeline_by_hand():
    image, target = make_sample(400, 600, [(100, 50, 300, 250)])
    transforms = make_coco_transforms("train")
    # Flip (0.1 < 0.5); crop branch (0.9 >= 0.5); resize to 500 -> 500 x 750; crop of 400 x 500 at (60, 200); resize to
    # 800: 400 / 500 is 4 : 5, so 800 x 1000.
    rng = Fixed(randoms=[0.1, 0.9], integers=[1, 400, 500, 60, 200, 10])
    image, result = transforms(image, target, rng)
    assert image.shape == (3, 800, 1000)
    # Flipped: 300, 50, 500, 250. Times 1.25: 375, 62.5, 625, 312.5. Cropped: 175, 2.5, 425, 252.5. Times 2.
    expected = torch.tensor([(350 + 850) / 2 / 1000, (5 + 505) / 2 / 800, 500 / 1000, 500 / 800])
    torch.testing.assert_close(result["boxes"][0], expected)
    torch.testing.assert_close(result["area"], torch.tensor([500.0 * 500.0]))
    assert result["size"].tolist() == [800, 1000]


def test_normalisation_keeps_the_layout():
    planes = make_sample()[0].contiguous()
    interleaved = planes.contiguous().permute(1, 2, 0).contiguous().permute(2, 0, 1)
    part = interleaved[:, 3:20, 5:30]
    assert T.normalize_image(planes).is_contiguous()
    for image in (interleaved, part):
        assert T.normalize_image(image).permute(1, 2, 0).is_contiguous()
        assert torch.equal(T.normalize_image(image), T.normalize_image(image.contiguous()))


def test_small_images_need_no_resize():
    image, target = make_sample(96, 128, [(8, 8, 40, 40)])
    transforms = make_coco_transforms("val", val_size=96, max_size=128)
    normalised, _ = transforms(image, target)
    torch.testing.assert_close(normalised, T.normalize_image(image))
    for seed in range(20):
        image, _ = make_coco_transforms("train", train_sizes=[96], max_size=128)(
            *make_sample(96, 128, [(8, 8, 40, 40)]), np.random.default_rng(seed))
        assert max(image.shape[1:]) <= 128


def test_outside_callers_may_pass_two_arguments_and_pillow_images():
    picture = Image.fromarray(np.full((60, 80), 120, dtype=np.uint8))
    target = {"boxes": torch.tensor([[10.0, 10.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    torch.manual_seed(3)
    first = make_coco_transforms("train", train_sizes=[64, 96])(picture, target)
    torch.manual_seed(3)
    second = make_coco_transforms("train", train_sizes=[64, 96])(picture, target)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1]["boxes"], second[1]["boxes"])
    assert first[0].shape[0] == 3 and type(first[1]["boxes"]) is torch.Tensor
    assert target["boxes"].tolist() == [[10, 10, 30, 30]]
    assert make_coco_transforms("val")(picture, None)[1] is None
    with pytest.raises(ValueError, match='"train" or "val", got \'test\''):
        make_coco_transforms("test")


def test_masks_and_boxes_stay_together():
    """Boxes drawn around the masks after any pipeline are the boxes, up to the rounding of nearest-neighbour masks
    (a pixel before a crop that is then enlarged up to 1.5 times, and a pixel after)."""
    transforms = make_coco_transforms("train", train_sizes=[50, 60], crop_resize=[60, 90], crop_size=[40, 60])
    for seed in range(30):
        image, result = transforms(*make_sample(seed=seed), np.random.default_rng(seed))
        height, width = image.shape[-2:]
        assert result["masks"].shape == (len(result["boxes"]), height, width)
        for mask, (cx, cy, w, h) in zip(result["masks"], result["boxes"].tolist()):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert abs(int(columns.min()) - (cx - w / 2) * width) <= 2.5
            assert abs(int(columns.max()) + 1 - (cx + w / 2) * width) <= 2.5
            assert abs(int(rows.min()) - (cy - h / 2) * height) <= 2.5
            assert abs(int(rows.max()) + 1 - (cy + h / 2) * height) <= 2.5


def test_sample_rng_is_a_function_of_its_three_numbers():
    draw = {key: tuple(T.sample_rng(*key).integers(0, 2**60, 4)) for key in
            [(seed, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (0, 1)]}
    assert len(set(draw.values())) == 8
    assert tuple(T.sample_rng(1, 0, 1).integers(0, 2**60, 4)) == draw[1, 0, 1]


@pytest.mark.parametrize("mode, value, expected", [
    ("L", 77, (77, 77, 77)), ("RGB", (1, 2, 3), (1, 2, 3)), ("RGBA", (9, 8, 7, 0), (9, 8, 7)),
    ("LA", (50, 0), (50, 50, 50)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)), ("1", 1, (255, 255, 255)), ("I;16", 0x8012, (128, 128, 128)),
])
def test_every_mode_becomes_rgb(mode, value, expected):
    image = pil_to_rgb_tensor(Image.new(mode, (4, 3), value))
    assert image.shape == (3, 3, 4) and image.dtype == torch.uint8
    assert image[:, 1, 2].tolist() == list(expected)


def test_palette_and_16_bit_files(tmp_path):
    palette = Image.new("P", (4, 3), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\xff")
    assert read_image(tmp_path / "palette.png")[0][:, 0, 0].tolist() == [10, 20, 30]
    Image.fromarray(np.full((3, 4), 0x4000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0][:, 0, 0].tolist() == [64, 64, 64]


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6   # "rotate by 90 degrees to show"
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    image, size = read_image(tmp_path / "turned.jpg")
    assert image.shape == (3, 30, 40) and size == (30, 40)


def test_large_jpegs_are_decoded_at_a_fraction_that_is_large_enough(tmp_path):
    ramp = np.linspace(0, 255, 1600 * 3).astype(np.uint8).reshape(1, 1600, 3).repeat(1200, 0)
    Image.fromarray(ramp).save(tmp_path / "large.jpg", quality=95)
    full, _ = read_image(tmp_path / "large.jpg")
    reduced, size = read_image(tmp_path / "large.jpg", short_side=128)
    assert full.shape == (3, 1200, 1600) and size == (1200, 1600)
    assert reduced.shape == (3, 300, 400)
    small, reference = T.resize_to(reduced, (128, 170)), T.resize_to(full, (128, 170))
    assert (small.int() - reference.int()).abs().max() <= 3


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 cut off"])
def test_broken_files_are_one_kind_of_error(tmp_path, content):
    (tmp_path / "broken.jpg").write_bytes(content)
    with pytest.raises(UnreadableImage, match="broken.jpg cannot be decoded"):
        read_image(tmp_path / "broken.jpg")
    with pytest.raises(UnreadableImage, match="absent.jpg does not exist"):
        read_image(tmp_path / "absent.jpg")
