"""Images of a labelled training that cannot be shown are named once, counted and replaced; evaluation refuses them."""
import json
import zlib

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from datasets.coco import CocoDetection
from datasets.coco_panoptic import CocoPanoptic
from datasets.image_io import MAX_PIXELS, UnreadableImage, read_image
from util.errors import InputError


# Each makes an image unusable in another way; `path` is a JPEG of 40 x 30.
SPOIL = {
    "vanished": lambda path: path.unlink(),
    "zero-size": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-200]),
    "not an image": lambda path: path.write_bytes(b"<html>404</html>" * 50),
    "of another size": lambda path: Image.new("RGB", (30, 40)).save(path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture
def folder(tmp_path):
    """A COCO set of five images, each with one object."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.effect_noise((40, 30), 60 + number).convert("RGB").save(tmp_path / "images" / f"{number}.jpg")
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(5)],
        "annotations": [{"id": i + 1, "image_id": 10 + i, "category_id": 1, "bbox": [i, 0, 10, 10]} for i in range(5)],
        "categories": [{"id": 1, "name": "thing", "isthing": 1}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def open_set(folder, **changes):
    return CocoDetection(folder / "images", folder / "instances.json", **changes)


@pytest.mark.parametrize("kind", SPOIL)
def test_training_replaces_an_unusable_image_and_evaluation_refuses_it(folder, kind, capfd):
    bad = folder / "images/4.jpg"
    SPOIL[kind](bad)
    dataset = open_set(folder, training=True)
    assert dataset.gather_unreadable() == []
    for _ in range(2):
        assert dataset[4][1]["image_id"].tolist() == [10]  # the first takes the place of the last
    assert [dataset[index][1]["image_id"].item() for index in range(4)] == [10, 11, 12, 13]
    assert dataset.gather_unreadable() == ["4.jpg"]
    reports = [line for line in capfd.readouterr().err.splitlines() if str(bad) in line]
    assert len(reports) == 1 and reports[0].startswith("passed over: image file") and "image id 14" in reports[0]
    with pytest.raises(InputError, match="4.jpg .*image id 14"):
        open_set(folder)[4]


def test_more_than_one_in_a_hundred_stop_the_run(folder):
    dataset = open_set(folder, training=True)
    for number in (0, 1):
        (folder / f"images/{number}.jpg").unlink()
    with pytest.raises(InputError, match=r"2 of the 5 images of .*instances.json cannot be read, which is more than 1%; "
                                         "the latest: image file .*1.jpg does not exist"):
        dataset[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_main_process_counts_what_workers_passed_over(folder, num_workers):
    (folder / "images/2.jpg").write_bytes(b"")
    dataset = open_set(folder, training=True)
    loader = DataLoader(dataset, num_workers=num_workers, collate_fn=lambda batch: batch[0])
    assert [target["image_id"].item() for _, target in loader] == [10, 11, 13, 13, 14]
    assert dataset.gather_unreadable() == ["2.jpg"]


def test_what_an_interrupted_run_could_not_read_counts_on(folder):
    (folder / "images/2.jpg").write_bytes(b"")
    dataset = open_set(folder, training=True)
    dataset.recall_unreadable(["2.jpg", "of another set.jpg"])
    assert dataset.unreadable == ["2.jpg"] == dataset.gather_unreadable(), "before its turn came again"
    assert dataset[2][1]["image_id"].tolist() == [13] and dataset.gather_unreadable() == ["2.jpg"]
    (folder / "images/4.jpg").unlink()
    with pytest.raises(InputError, match="2 of the 5 images"):
        dataset[4]


def test_what_was_mended_meanwhile_is_shown_again(folder):
    dataset = open_set(folder, training=True)
    dataset.recall_unreadable(["2.jpg"])
    assert dataset[2][1]["image_id"].tolist() == [12] and dataset.gather_unreadable() == []


def test_the_checksum_of_the_samples_knows_names_and_ids(folder):
    def checksum(change=lambda content: None):
        content = json.loads((folder / "instances.json").read_text())
        change(content)
        (folder / "changed.json").write_text(json.dumps(content))
        return CocoDetection(folder / "images", folder / "changed.json").samples_checksum()

    def number(content):
        content["images"][0]["id"] = content["annotations"][0]["image_id"] = 99

    def rename(content):
        content["images"][0]["file_name"] = "0.png"

    assert checksum() == checksum(lambda content: content["images"].reverse())
    assert len({checksum(), checksum(number), checksum(rename)}) == 3


def test_a_replacement_is_augmented_as_on_its_own(folder):
    """The sample depends on seed, epoch and the index shown, not on the place it fills."""
    dataset = open_set(folder, training=True, transforms=lambda image, target, rng: (rng.integers(2**40), target))
    expected = dataset[3][0]
    (folder / "images/2.jpg").unlink()
    assert dataset[2][0] == expected


def test_unusable_masks_count_too(folder):
    content = json.loads((folder / "instances.json").read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[0, 0, 5, 0, 5, 5]]
    content["annotations"][1]["segmentation"] = {"size": [1, 1], "counts": "x"}
    (folder / "instances.json").write_text(json.dumps(content))
    dataset = open_set(folder, training=True, return_masks=True)
    assert dataset[1][1]["image_id"].tolist() == [12] and dataset.gather_unreadable() == ["1.jpg"]


def test_panoptic_training_replaces_images_whose_segments_cannot_be_read(folder):
    content = json.loads((folder / "instances.json").read_text())
    (folder / "panoptic").mkdir()
    content["annotations"] = []
    for i in range(3):
        Image.new("RGB", (40, 30), (7, 0, 0)).save(folder / "panoptic" / f"{i}.png")
        segment = {"id": 7, "category_id": 1, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 0}
        content["annotations"].append({"image_id": 10 + i, "file_name": f"{i}.png", "segments_info": [segment]})
    (folder / "panoptic.json").write_text(json.dumps(content))
    (folder / "panoptic/1.png").write_bytes(b"\x89PNG")
    paths = folder / "images", folder / "panoptic", folder / "panoptic.json"
    dataset = CocoPanoptic(*paths, training=True)
    assert dataset[1][1]["image_id"].tolist() == [12] and dataset.gather_unreadable() == ["1.jpg"]
    with pytest.raises(InputError, match="1.png cannot be decoded"):
        CocoPanoptic(*paths)[1]


def test_decompression_bombs_are_not_decoded(folder):
    """A file of some kilobytes just over the limit, and one that says it has 60000 x 60000 pixels."""
    path = folder / "images/4.jpg"
    Image.new("1", (2**14, 2**13 + 1)).save(path, "PNG")
    assert path.stat().st_size < 100_000
    with pytest.raises(UnreadableImage, match=f"4.jpg has 16384x8193 pixels, more than {MAX_PIXELS}"):
        read_image(path)
    assert open_set(folder, training=True)[4][1]["image_id"].tolist() == [10]
    content = path.read_bytes()
    header = b"IHDR" + 2 * (60_000).to_bytes(4, "big") + content[24:29]
    path.write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:])
    with pytest.raises(UnreadableImage, match="4.jpg cannot be decoded .*3600000000 pixels.* decompression bomb"):
        read_image(path)
