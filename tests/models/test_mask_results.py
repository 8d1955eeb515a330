"""Masks and panoptic maps worked out by hand on a few pixels."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from models.mask_results import PostProcessPanoptic, PostProcessSegm
from util.panoptic_ids import ids_to_rgb, rgb_to_ids

CAT, DOG, SKY, SEA, UNKNOWN, NOTHING = range(6)
IS_THING = {CAT: True, DOG: True, SKY: False, SEA: False}


def panoptic_outputs(detections, size=(4, 6)):
    """Outputs of one image whose queries see a class with a probability, and a mask [H][W] of logits."""
    logits = torch.full((1, len(detections), NOTHING + 1), 0.0)
    masks = torch.zeros(1, len(detections), *size)
    for i, (label, probability, mask) in enumerate(detections):
        rest = (1 - probability) / NOTHING
        logits[0, i] = torch.full((NOTHING + 1,), rest).log()
        logits[0, i, label] = torch.tensor(probability).log()
        masks[0, i] = mask
    return {"pred_logits": logits, "pred_masks": masks}


def decode(result):
    with Image.open(io.BytesIO(result["png_string"])) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return rgb_to_ids(np.asarray(picture))


def region(rows, columns, inside=5.0, size=(4, 6)):
    """A mask that is sure inside some rows and columns."""
    mask = torch.full(size, -5.0)
    mask[rows, columns] = inside
    return mask


LEFT, RIGHT, EVERYWHERE = (region(slice(None), columns) for columns in (slice(0, 3), slice(3, 6), slice(0, 6)))


def run(detections, threshold=0.85, target_sizes=None, size=(4, 6), is_thing=IS_THING):
    process = PostProcessPanoptic(is_thing, threshold)
    result, = process(panoptic_outputs(detections, size), [size], target_sizes)
    return decode(result), result["segments_info"]


# Panoptic maps.


def test_each_pixel_goes_to_the_strongest_mask():
    ids, segments = run([(CAT, 0.9, LEFT), (SKY, 0.95, region(slice(None), slice(2, 6), inside=4.0))])
    assert ids.tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    assert segments == [{"id": 0, "isthing": True, "category_id": CAT, "area": 12},
                        {"id": 1, "isthing": False, "category_id": SKY, "area": 12}]


def test_unsure_queries_no_object_and_unknown_classes_take_no_part():
    detections = [(NOTHING, 0.99, EVERYWHERE + 9), (UNKNOWN, 0.99, EVERYWHERE + 8), (DOG, 0.85, EVERYWHERE + 7),
                  (CAT, 0.86, LEFT), (SEA, 0.9, RIGHT)]
    ids, segments = run(detections)
    assert ids.tolist() == [[0, 0, 0, 1, 1, 1]] * 4, "a score has to be above the threshold, not at it"
    assert [segment["category_id"] for segment in segments] == [CAT, SEA]
    assert [segment["category_id"] for segment in run(detections, threshold=0.5)[1]] == [DOG]


@pytest.mark.parametrize("detections", [[], [(NOTHING, 0.99, EVERYWHERE)], [(CAT, 0.6, LEFT), (SKY, 0.3, RIGHT)]],
                         ids=["no queries", "no object", "unsure"])
def test_without_any_detection_the_map_is_empty(detections):
    ids, segments = run(detections, target_sizes=[(3, 5)])
    assert segments == [] and ids.shape == (3, 5) and (ids == 0).all()


def test_two_things_of_a_class_stay_two():
    ids, segments = run([(CAT, 0.9, LEFT), (CAT, 0.9, RIGHT)])
    assert ids.tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    assert [segment["area"] for segment in segments] == [12, 12]


def test_stuff_of_a_class_becomes_one_segment():
    """The second mask of the sky owns no pixel once it is merged into the first; its pixels go to the strongest of the
    masks that are left, which here is the first mask of the sky."""
    first = region(slice(None), slice(0, 3)) + torch.where(RIGHT > 0, 2.0, 0.0)
    ids, segments = run([(SKY, 0.9, first), (SKY, 0.9, RIGHT), (CAT, 0.9, region(slice(0, 2), slice(0, 3), 9.0))])
    assert segments == [{"id": 0, "isthing": False, "category_id": SKY, "area": 18},
                        {"id": 1, "isthing": True, "category_id": CAT, "area": 6}]
    assert ids.tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0] * 6] * 2


def test_the_second_assignment_does_not_merge():
    """As in the published program: what the merged-away mask covered goes to whatever mask comes next there, here the
    cat's, although the sky's two masks were one segment before."""
    cat = region(slice(0, 2), slice(0, 3), 9.0) + torch.where(RIGHT > 0, 1.0, 0.0)
    ids, segments = run([(SKY, 0.9, LEFT), (SKY, 0.9, RIGHT), (CAT, 0.9, cat)])
    assert [(segment["category_id"], segment["area"]) for segment in segments] == [(SKY, 6), (CAT, 18)]
    assert ids.tolist() == [[1] * 6] * 2 + [[0, 0, 0, 1, 1, 1]] * 2


def test_tiny_segments_are_dropped_until_none_is_left():
    """The dog owns 4 pixels and goes; the sea then wins these but owns no more than 4 as well, and goes too."""
    dog, sea = region(slice(0, 2), slice(0, 2), 9.0), region(slice(0, 2), slice(0, 2), 8.0)
    ids, segments = run([(CAT, 0.9, EVERYWHERE), (DOG, 0.9, dog), (SEA, 0.9, sea)])
    assert (ids == 0).all() and segments == [{"id": 0, "isthing": True, "category_id": CAT, "area": 24}]
    five = region(slice(0, 1), slice(0, 5), 9.0)
    assert [segment["area"] for segment in run([(CAT, 0.9, EVERYWHERE), (DOG, 0.9, five)])[1]] == [19, 5]


def test_a_map_without_large_segments_is_empty():
    ids, segments = run([(CAT, 0.9, torch.zeros(2, 2))], size=(2, 2))
    assert segments == [] and (ids == 0).all()


@pytest.mark.parametrize("target", [(8, 12), (7, 5), (3, 17)])
def test_maps_are_resized_as_pillow_resizes_to_the_nearest(target):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 10, 14, generator=generator)
    detections = [(CAT, 0.9, mask) for mask in masks]
    small = Image.fromarray(masks.argmax(0).to(torch.uint8).numpy())
    ids, segments = run(detections, target_sizes=torch.tensor([target]), size=(10, 14))
    assert np.array_equal(ids, np.asarray(small.resize(target[::-1], Image.Resampling.NEAREST)))
    assert [segment["area"] for segment in segments] == np.bincount(ids.ravel()).tolist()


def test_padding_is_cut_off():
    """An image in a batch with a larger one: its map is the part of the masks that shows it, enlarged alike."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(3, 4, 6, generator=generator)
    one = panoptic_outputs([(CAT, 0.9, mask) for mask in masks])
    outputs = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in one.items()}
    large, small = PostProcessPanoptic(IS_THING)(outputs, torch.tensor([[16, 24], [10, 7]]))
    assert np.array_equal(decode(small), decode(large)[:10, :7])
    with pytest.raises(ValueError, match="1 target sizes came with 2 processed sizes"):
        PostProcessPanoptic(IS_THING)(outputs, [(16, 24), (10, 7)], [(16, 24)])


def test_ids_in_colours():
    ids = np.array([[0, 255, 256], [65536, 256 ** 3 - 1, 12345678]])
    colours = ids_to_rgb(ids)
    assert colours[0].tolist() == [[0, 0, 0], [255, 0, 0], [0, 1, 0]] and colours[1, 0].tolist() == [0, 0, 1]
    assert np.array_equal(rgb_to_ids(colours), ids)


# Masks of detections.


def segm(masks, sizes, originals, threshold=0.5):
    results = [{"scores": torch.ones(masks.shape[1])} for _ in sizes]
    found = PostProcessSegm(threshold)(results, {"pred_masks": masks}, torch.tensor(originals), torch.tensor(sizes))
    assert found is results and "scores" in found[0]
    return [result["masks"] for result in found]


def test_a_mask_is_enlarged_cut_and_brought_to_the_original():
    """2 x 2 logits for a batch of 4 x 4 pixels, of which the image fills 4 x 3; the original is twice as large.

    A row [a, b] enlarges bilinearly to [a, (3a + b) / 4, (a + 3b) / 4, b].
    """
    masks = torch.tensor([[[[4.0, -8.0], [4.0, -8.0]], [[-1.0, -1.0], [1.0, 1.0]]]])
    batch = torch.cat([masks, torch.zeros_like(masks)])  # the other image is 4 x 4
    sizes = dict(sizes=[[4, 3], [4, 4]], originals=[[8, 6], [4, 4]])
    found, other = segm(batch, **sizes)
    assert not other.any()
    assert found.shape == (2, 1, 8, 6) and found.dtype == torch.bool
    # Columns 4, 1, -5 of the first; rows -1, -1/2, 1/2, 1 of the second. At 0 the probability is 0.5: not above it.
    assert found[0, 0].tolist() == [[True, True, True, True, False, False]] * 8
    assert found[1, 0].tolist() == [[False] * 6] * 4 + [[True] * 6] * 4
    stricter, _ = segm(batch, **sizes, threshold=0.8)
    assert stricter[0, 0, 0].tolist() == [True, True, False, False, False, False], "sigmoid(1) = 0.73"
    assert not stricter[1].any()


def test_images_of_a_batch_are_resized_each_to_its_own():
    masks = torch.randn(2, 23, 6, 6, generator=torch.Generator().manual_seed(0))
    first, second = segm(masks, sizes=[[24, 20], [12, 24]], originals=[[31, 17], [50, 100]])
    assert first.shape == (23, 1, 31, 17) and second.shape == (23, 1, 50, 100)
    # Pixels of the original are those of the enlarged mask that lie nearest, above and to the left.
    enlarged = torch.nn.functional.interpolate(masks[1:], size=(24, 24), mode="bilinear")[0, :, :12] > 0
    assert torch.equal(second[:, 0, 7, 30], enlarged[:, 7 * 12 // 50, 30 * 24 // 100])
