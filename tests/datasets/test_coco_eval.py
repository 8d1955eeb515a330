"""The evaluator against pycocotools itself, and against itself under two processes."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco import index_ground_truth
from datasets.coco_eval import CocoEvaluator

IMAGES, CATEGORIES = 12, (1, 3, 8)


def random_ground_truth(seed, first_id=1):
    """Images of 100 x 120 with up to six objects of all sizes, a fifth of them crowds."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image_id in range(1, IMAGES + 1):
        for _ in range(rng.integers(0, 7)):
            x, y = rng.uniform(0, 90, 2)
            width, height = rng.uniform(2, 118 - x), rng.uniform(2, 98 - y)
            crowd = int(rng.random() < 0.2)
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            segmentation = mask_codec.merge(mask_codec.frPyObjects([polygon], 100, 120))
            segmentation["counts"] = segmentation["counts"].decode()
            annotations.append({
                "id": len(annotations) + first_id, "image_id": image_id, "iscrowd": crowd,
                "category_id": int(rng.choice(CATEGORIES)), "bbox": [x, y, width, height], "area": width * height,
                "segmentation": segmentation if crowd else [polygon]})
    return {"images": [{"id": number, "height": 100, "width": 120} for number in range(1, IMAGES + 1)],
            "annotations": annotations, "categories": [{"id": number, "name": f"c{number}"} for number in CATEGORIES],
            "info": {}}


def random_detections(ground_truth, seed):
    """Objects moved about a little, some of another class, and boxes anywhere; also of a class that does not exist."""
    rng = np.random.default_rng(seed)
    predictions = {}
    for image in ground_truth["images"]:
        boxes, labels = [], []
        for annotation in ground_truth["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, width, height = annotation["bbox"]
                for _ in range(rng.integers(0, 3)):
                    boxes.append(np.array([x, y, x + width, y + height]) + rng.normal(0, 2, 4))
                    labels.append(annotation["category_id"] if rng.random() < 0.8 else rng.choice([*CATEGORIES, 5]))
        for _ in range(rng.integers(0, 4)):
            corner = rng.uniform(0, 60, 2)
            boxes.append(np.concatenate([corner, corner + rng.uniform(1, 50, 2)]))
            labels.append(rng.choice(CATEGORIES))
        boxes = torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        masks = torch.zeros(len(boxes), 1, 100, 120)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.clamp(min=0).round().int().tolist()):
            mask[0, y0:y1, x0:x1] = 1
        scores = torch.tensor(rng.random(len(boxes)), dtype=torch.float32)
        predictions[image["id"]] = {"boxes": boxes, "masks": masks, "scores": scores,
                                    "labels": torch.tensor(np.array(labels, dtype=np.int64))}
    return predictions


def evaluate(coco, *updates, iou_types=("bbox",)):
    evaluator = CocoEvaluator(coco, iou_types)
    for predictions in updates:
        evaluator.update(predictions)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


def pycocotools_stats(ground_truth, predictions, iou_type="bbox"):
    return pycocotools_evaluation(ground_truth, predictions, iou_type).stats


class IgnoringDifficult(COCOeval):
    """pycocotools as it would be if a difficult object, like a crowd, could be found often, but with the usual IoU."""

    def _prepare(self):
        for annotation in self.cocoGt.anns.values():  # as it was before an earlier evaluation
            annotation["iscrowd"] = annotation.setdefault("crowd", annotation["iscrowd"])
        super()._prepare()
        for annotation in (annotation for group in self._gts.values() for annotation in group):
            annotation["ignore"] = annotation["ignore"] or annotation.get("difficult", 0)

    def evaluateImg(self, *where):
        for annotation in (annotation for group in self._gts.values() for annotation in group):
            annotation["iscrowd"] = annotation["iscrowd"] or annotation.get("difficult", 0)  # all IoUs are known by now
        return super().evaluateImg(*where)


def pycocotools_evaluation(ground_truth, predictions, iou_type="bbox"):
    """What pycocotools gives when used as its own demonstration does."""
    coco = COCO()
    coco.dataset = json.loads(json.dumps(ground_truth))
    coco.createIndex()
    results = []
    for image_id, found in predictions.items():
        for box, mask, score, label in zip(found["boxes"].double(), found["masks"], found["scores"], found["labels"]):
            x0, y0, x1, y1 = box.tolist()
            result = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            if iou_type == "bbox":
                result["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            else:
                result["segmentation"] = mask_codec.encode(np.asfortranarray(mask[0].numpy().astype(np.uint8)))
            results.append(result)
    evaluation = IgnoringDifficult(coco, coco.loadRes(results), iou_type)
    evaluation.params.imgIds = sorted(predictions)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_equals_pycocotools_on_random_cases(seed, iou_type):
    ground_truth = random_ground_truth(seed)
    predictions = random_detections(ground_truth, seed + 100)
    if seed % 2:   # only images that were evaluated count
        predictions = {image_id: found for image_id, found in predictions.items() if image_id % 3}
    stats = evaluate(index_ground_truth(json.loads(json.dumps(ground_truth))), predictions,
                     iou_types=[iou_type]).coco_eval[iou_type].stats
    expected = pycocotools_stats(ground_truth, predictions, iou_type)
    np.testing.assert_allclose(stats, expected, rtol=0, atol=1e-12)
    assert 0.05 < stats[1] < 1


@pytest.mark.parametrize("seed", range(4))
def test_ties_crowds_difficult_objects_and_more_than_a_hundred_detections(seed):
    """Few places, few scores, all objects alike: which of equal candidates is taken decides the tables."""
    rng = np.random.default_rng(seed)
    images, annotations, predictions = [{"id": number, "height": 60, "width": 60} for number in (3, 1, 2)], [], {}
    for image in images:
        for _ in range(12):
            x, y, side = rng.integers(0, 4, 3) * [8, 8, 4] + [0, 0, 24]
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], "category_id": int(rng.choice([1, 3])),
                                "bbox": [int(x), int(y), int(side), int(side)],
                                "area": int(side * side) // int(rng.choice([1, 2])),
                                "iscrowd": int(rng.random() < 0.2), "difficult": int(rng.random() < 0.2)})
        corners = rng.integers(0, 4, (240, 2)) * 8.0
        predictions[image["id"]] = {
            "boxes": torch.tensor(np.concatenate([corners, corners + 24 + 4 * rng.integers(0, 4, (240, 1))], axis=1)),
            "scores": torch.tensor(rng.integers(0, 8, 240) / 8), "labels": torch.tensor(rng.choice([1, 3], 240)),
            "masks": torch.zeros(240, 1, 60, 60)}
    ground_truth = {"images": images, "annotations": annotations, "info": {},
                    "categories": [{"id": number, "name": str(number)} for number in (3, 1)]}
    ours = evaluate(index_ground_truth(json.loads(json.dumps(ground_truth))), predictions).coco_eval["bbox"]
    theirs = pycocotools_evaluation(ground_truth, predictions)
    np.testing.assert_allclose(ours.stats, theirs.stats, rtol=0, atol=1e-15)
    compare_tables(ours.eval, theirs.eval)
    for evaluation in (ours, theirs):   # without regard to classes
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
    compare_tables(ours.eval, theirs.eval)


def compare_tables(ours, theirs):
    """pycocotools keeps a division by zero away by adding 2.2e-16, which precision shows."""
    np.testing.assert_array_equal(ours["recall"], theirs["recall"])
    np.testing.assert_array_equal(ours["scores"], theirs["scores"])
    np.testing.assert_allclose(ours["precision"], theirs["precision"], rtol=0, atol=1e-15)


def test_both_iou_types_at_once():
    ground_truth = random_ground_truth(0)
    predictions = random_detections(ground_truth, 1)
    evaluator = evaluate(index_ground_truth(ground_truth), predictions, iou_types=["bbox", "segm"])
    for iou_type in ("bbox", "segm"):
        np.testing.assert_allclose(evaluator.coco_eval[iou_type].stats,
                                   pycocotools_stats(ground_truth, predictions, iou_type), rtol=0, atol=1e-12)


def test_an_empty_dict_is_an_image_without_detections():
    """The one object is missed: AP is 0."""
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    truth = index_ground_truth({"images": [{"id": 1, "width": 64, "height": 64}], "annotations": [box],
                                "categories": [{"id": 1, "name": "a"}]})
    evaluator = CocoEvaluator(truth, ["bbox"])
    evaluator.update({1: {}})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    assert evaluator.coco_eval["bbox"].stats[0] == 0


def test_batches_and_repeated_images_change_nothing():
    ground_truth = random_ground_truth(2)
    predictions = random_detections(ground_truth, 3)
    at_once = evaluate(index_ground_truth(ground_truth), predictions).coco_eval["bbox"].stats
    parts = [{image_id: found} for image_id, found in predictions.items()]
    np.testing.assert_array_equal(
        evaluate(index_ground_truth(ground_truth), *parts, *parts[:5]).coco_eval["bbox"].stats, at_once)


def test_evaluating_again_gives_the_same_and_leaves_the_ground_truth_alone():
    ground_truth = random_ground_truth(4)
    coco, predictions = index_ground_truth(ground_truth), random_detections(ground_truth, 5)
    before = json.dumps(ground_truth)
    first = evaluate(coco, predictions, iou_types=["bbox", "segm"])
    assert json.dumps(ground_truth) == before
    second = evaluate(coco, predictions)
    np.testing.assert_array_equal(first.coco_eval["bbox"].stats, second.coco_eval["bbox"].stats)


def test_annotation_ids_may_start_at_zero():
    """pycocotools takes a match with annotation 0 for no match; the ids must not matter."""
    from_one, from_zero = random_ground_truth(6), random_ground_truth(6, first_id=0)
    predictions = random_detections(from_one, 7)
    np.testing.assert_array_equal(evaluate(index_ground_truth(from_one), predictions).coco_eval["bbox"].stats,
                                  evaluate(index_ground_truth(from_zero), predictions).coco_eval["bbox"].stats)


def no_detections():
    return {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, 100, 120), "scores": torch.zeros(0),
            "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_no_detections_at_all(iou_type):
    coco = index_ground_truth(random_ground_truth(8))
    stats = evaluate(coco, {image_id: no_detections() for image_id in coco.imgs}, iou_types=[iou_type]).coco_eval[
        iou_type].stats
    assert set(stats) <= {0.0, -1.0} and stats[0] == 0


def test_no_images_at_all():
    stats = evaluate(index_ground_truth(random_ground_truth(8))).coco_eval["bbox"].stats
    assert stats.tolist() == [-1] * 12


def test_per_class_by_hand():
    """Class a: one of two objects found, exactly: precision 1 up to recall 1/2 is AP 51/101. Class b: found with IoU
    0.8, so at the thresholds .50 to .80: AP 7/10. Class c has no object."""
    ground_truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "bbox": [50, 0, 10, 10], "area": 100, "iscrowd": 0},
            {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 50, 20, 20], "area": 400, "iscrowd": 0}]}
    found = {"boxes": torch.tensor([[0., 0, 10, 10], [0, 50, 16, 70]]), "scores": torch.tensor([0.9, 0.8]),
             "labels": torch.tensor([1, 2])}
    results = evaluate(index_ground_truth(ground_truth), {1: found}).per_class()
    assert results["a"] == pytest.approx((51 / 101, 51 / 101))
    assert results["b"] == pytest.approx((0.7, 1))
    assert results["c"] == (-1, -1)


def test_says_twelve_lines_and_no_more(capsys):
    ground_truth = random_ground_truth(9)
    coco = index_ground_truth(ground_truth)
    evaluate(coco, random_detections(ground_truth, 10))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "IoU metric: bbox" and len(lines) == 13
    assert all(line.startswith(" Average") for line in lines[1:])


def test_unknown_images_and_types_are_refused():
    coco = index_ground_truth(random_ground_truth(9))
    with pytest.raises(ValueError, match="image id 99 is not in the ground truth"):
        CocoEvaluator(coco, ["bbox"]).update({99: no_detections()})
    with pytest.raises(ValueError, match="unknown IoU type 'keypoints', expected one of bbox, segm"):
        CocoEvaluator(coco, ["keypoints"])


PROGRAM = """
import json, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_coco_eval import evaluate, random_detections, random_ground_truth
from datasets.coco import index_ground_truth
from util.distributed import shutdown

rank, store, folder = int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
ground_truth = random_ground_truth(11)
# Unequal shares that overlap in one image, as when a sampler pads.
mine = (lambda number: number <= 5) if rank == 0 else (lambda number: number >= 5)
predictions = {number: found for number, found in random_detections(ground_truth, 12).items() if mine(number)}
stats = evaluate(index_ground_truth(ground_truth), predictions).coco_eval["bbox"].stats
json.dump(stats.tolist(), open(folder + "/" + str(rank), "w"))
shutdown()
"""


def test_two_processes_give_exactly_the_result_of_one(tmp_path, root):
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, here, str(rank), str(tmp_path / "store"), str(tmp_path)],
                         env=environment, stdout=subprocess.PIPE, text=True) for rank in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    ground_truth = random_ground_truth(11)
    expected = evaluate(index_ground_truth(ground_truth), random_detections(ground_truth, 12)).coco_eval["bbox"].stats
    for rank in range(2):
        np.testing.assert_array_equal(json.loads((tmp_path / str(rank)).read_text()), expected)
    assert len(printed[0].splitlines()) == 13 and printed[1] == ""
