"""Long lists in one block of bytes, and the annotations of a training in such lists."""
import argparse
import gc
import json
import pickle

import pytest
from PIL import Image

from datasets import build_dataset
from datasets.packed import pack_paths, pack_records


def test_what_comes_out_is_what_went_in():
    records = [{"id": 2**40, "bbox": [1, 2.5, -3e-9, 0.1], "ü": None, "nested": {"counts": "0PP1", "size": [3, True]}}, {}]
    packed = pack_records(records)
    assert list(packed) == records and len(packed) == 2 and packed[1] == {}
    packed[0]["id"] = 0
    assert packed[0] == records[0], "an item is new each time"
    paths = ["a/b.jpg", "", "ö.png", "not\udcffutf-8.jpg"]
    assert list(pickle.loads(pickle.dumps(pack_paths(paths)))) == paths
    for index in (-1, 2):
        with pytest.raises(IndexError):
            packed[index]


def write_set(folder, objects):
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "images" / "a.png")
    content = {"images": [{"id": i + 1, "file_name": f"{i}.png", "width": 9, "height": 9} for i in range(objects)],
               "annotations": [{"id": i + 1, "image_id": objects - i, "category_id": 1 + i % 3, "bbox": [1, 1, 5, 1 + i % 7],
                                "segmentation": [[1, 1, 5, 1, 5, 5]], "iscrowd": i % 5 == 0} for i in range(objects)],
               "categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)]}
    (folder / "set.json").write_text(json.dumps(content))
    sizes = dict.fromkeys(("train_sizes", "val_size", "max_size", "crop_resize", "crop_size"))
    return argparse.Namespace(dataset_file="coco", coco_path=str(folder), train_images="images", val_images="images",
                              train_annotations="set.json", val_annotations="set.json", eval=False, num_classes=4, seed=0,
                              class_split=None, filter_pct=-1, filter_num=-1, filter_file=None, shots=None, **sizes)


def test_the_number_of_python_objects_does_not_grow_with_the_annotations(tmp_path):
    """Those would be copied into each loading process, page by page, as it touches them."""
    counts = []
    for number, objects in enumerate((50, 50, 2000)):  # the first may also fill what lasts
        args = write_set(tmp_path / str(number), objects)
        gc.collect()
        before = len(gc.get_objects())
        dataset = build_dataset("train", args)
        gc.collect()
        counts.append(len(gc.get_objects()) - before)
        assert len(dataset) == objects
    assert abs(counts[2] - counts[1]) < 100


def test_training_and_evaluation_have_the_same_ground_truth(tmp_path):
    args = write_set(tmp_path / "set", 30)
    train, val = (build_dataset(part, args) for part in ("train", "val"))
    assert train.ids == val.ids and train.objects_per_image().tolist() == val.objects_per_image().tolist()
    without_masks = {key: {name: value for name, value in annotation.items() if name != "segmentation"}
                     for key, annotation in val.coco.anns.items()}
    assert train.coco.anns == without_masks and train.coco.imgs == val.coco.imgs
    for index in range(30):
        mine, other = train._target(index, 9, 9), val._target(index, 9, 9)
        assert all(mine[name].tolist() == other[name].tolist() for name in other)
