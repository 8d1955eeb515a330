"""Panoptic quality of cases counted by hand, of random ones against panopticapi, and under two processes."""
import io
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from datasets.panoptic_eval import PanopticEvaluator, match_segments
from util.errors import InputError
from util.panoptic_ids import ids_to_rgb

THING, OTHER, STUFF = 1, 4, 6
CATEGORIES = [{"id": THING, "name": "thing", "isthing": 1}, {"id": OTHER, "name": "other", "isthing": 1},
              {"id": STUFF, "name": "stuff", "isthing": 0}]


def columns(*segments):
    """A 10 x 10 image of upright stripes, (category, number of columns, iscrowd or nothing), category 0 for void.

    Returns:
        ids, and segments_info with ids from 1.
    """
    ids, infos, left = np.zeros((10, 10), dtype=np.int64), [], 0
    for number, (category, width, *crowd) in enumerate(segments, start=1):
        if category:
            ids[:, left:left + width] = number
            infos.append({"id": number, "category_id": category, "iscrowd": sum(crowd), "area": 10 * width})
        left += width
    return ids, infos


# Each case: truth, prediction, and by category (sum of IoUs, true positives, false positives, false negatives).
BY_HAND = {
    "matched": ([(THING, 5), (STUFF, 5)], [(THING, 6), (STUFF, 4)], {THING: (50 / 60, 1, 0, 0), STUFF: (0.8, 1, 0, 0)}),
    "exactly half is no match": ([(THING, 5), (STUFF, 5)], [(THING, 10)], {THING: (0, 0, 1, 1), STUFF: (0, 0, 0, 1)}),
    "of another category": ([(THING, 10)], [(OTHER, 10)], {THING: (0, 0, 0, 1), OTHER: (0, 0, 1, 0)}),
    "void in the truth doesn't count": ([(THING, 5), (0, 5)], [(THING, 10)], {THING: (1.0, 1, 0, 0)}),
    "void in the prediction counts": ([(THING, 10)], [(THING, 6), (0, 4)], {THING: (0.6, 1, 0, 0)}),
    "mostly on void is passed over": ([(THING, 4), (0, 6)], [(THING, 4), (OTHER, 6)], {THING: (1.0, 1, 0, 0)}),
    "half on void is wrong": ([(THING, 8), (0, 2)], [(THING, 6), (OTHER, 4)],
                              {THING: (0.75, 1, 0, 0), OTHER: (0, 0, 1, 0)}),
    "a crowd is neither found nor missed": ([(THING, 5, 1), (STUFF, 5)], [(0, 5), (STUFF, 5)], {STUFF: (1.0, 1, 0, 0)}),
    "objects in their crowd are passed over": ([(THING, 5, 1), (STUFF, 5)], [(THING, 2), (THING, 3), (STUFF, 5)],
                                               {STUFF: (1.0, 1, 0, 0)}),
    "a crowd excuses its own category alone": ([(THING, 5, 1), (STUFF, 5)], [(OTHER, 5), (STUFF, 5)],
                                               {OTHER: (0, 0, 1, 0), STUFF: (1.0, 1, 0, 0)}),
    "crowd and void together": ([(THING, 3, 1), (0, 3), (STUFF, 4)], [(THING, 10)], {STUFF: (0, 0, 0, 1)}),
    "two of a category": ([(THING, 4), (THING, 4), (0, 2)], [(THING, 4), (THING, 3), (THING, 1), (0, 2)],
                          {THING: (1.75, 2, 1, 0)}),
    "nothing predicted": ([(THING, 4), (STUFF, 6)], [], {THING: (0, 0, 0, 1), STUFF: (0, 0, 0, 1)}),
    "nothing true": ([], [(THING, 10)], {}),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_matching_by_hand(case):
    truth, found, expected = BY_HAND[case]
    tallies = match_segments(*columns(*truth), *columns(*found))
    assert tallies == {category: pytest.approx(tally) for category, tally in expected.items()}


@pytest.mark.parametrize("case", BY_HAND)
def test_predicted_ids_may_start_at_zero(case):
    """Where every pixel belongs to a segment; panopticapi takes such ids likewise, and DETR numbers its segments so."""
    truth, found, expected = BY_HAND[case]
    ids, segments = columns(*found)
    if (ids > 0).all():
        segments = [{**segment, "id": segment["id"] - 1} for segment in segments]
        tallies = match_segments(*columns(*truth), ids - 1, segments)
        assert tallies == {category: pytest.approx(tally) for category, tally in expected.items()}


def test_pixels_without_a_segment_are_not_void():
    """Ids that the true segments don't list are no excuse for a prediction, unlike void ones."""
    ids, segments = columns((THING, 4), (STUFF, 6))
    found = columns((THING, 4), (OTHER, 6))
    assert match_segments(ids, segments[:1], *found) == {THING: (1.0, 1, 0, 0), OTHER: (0.0, 0, 1, 0)}


def png(ids):
    stream = io.BytesIO()
    Image.fromarray(ids_to_rgb(ids)).save(stream, "PNG")
    return stream.getvalue()


def write_truth(folder, pictures):
    """Writes {image id: (ids, segments)} as a panoptic JSON and a folder of PNGs; returns their paths."""
    (folder / "panoptic").mkdir()
    annotations = []
    for image_id, (ids, segments) in pictures.items():
        (folder / "panoptic" / f"{image_id}.png").write_bytes(png(ids))
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    images = [{"id": image_id, "file_name": f"{image_id}.jpg"} for image_id in pictures]
    path = folder / "panoptic.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path, folder / "panoptic"


def as_predictions(pictures):
    return [{"image_id": image_id, "file_name": f"{image_id}.png", "png_string": png(ids),
             "segments_info": [{"id": info["id"], "category_id": info["category_id"], "isthing": True,
                                "area": info["area"]} for info in segments]}
            for image_id, (ids, segments) in pictures.items()]


def evaluate(truth, *updates, output_dir=None):
    evaluator = PanopticEvaluator(*truth, output_dir)
    for predictions in updates:
        evaluator.update(predictions)
    evaluator.synchronize_between_processes()
    return evaluator, evaluator.summarize()


def test_results_are_means_over_categories_of_sums_over_images(tmp_path, capsys):
    """thing: IoU 0.8 in one image, missed in the other: SQ 0.8, RQ 1 / 1.5, PQ 8/15. other: a false positive. stuff:
    IoU 5/6 and 1, mean 11/12."""
    truth = write_truth(tmp_path, {1: columns((THING, 5), (STUFF, 5)), 2: columns((THING, 2), (STUFF, 8))})
    found = {1: columns((THING, 4), (STUFF, 6)), 2: columns((OTHER, 2), (STUFF, 8))}
    evaluator, results = evaluate(truth, as_predictions(found))
    assert results["Things"] == pytest.approx({"pq": 4 / 15, "sq": 0.4, "rq": 1 / 3, "n": 2})
    assert results["Stuff"] == pytest.approx({"pq": 11 / 12, "sq": 11 / 12, "rq": 1, "n": 1})
    assert results["All"] == pytest.approx({"pq": (8 / 15 + 11 / 12) / 3, "sq": (0.8 + 11 / 12) / 3,
                                            "rq": (2 / 3 + 1) / 3, "n": 3})
    assert evaluator.per_class()["thing"] == pytest.approx((8 / 15, 0.8, 2 / 3))
    assert evaluator.per_class()["other"] == (0, 0, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["|", "PQ", "SQ", "RQ", "N"], ["All", "|", "48.3", "57.2", "55.6", "3"],
        ["Things", "|", "26.7", "40.0", "33.3", "2"], ["Stuff", "|", "91.7", "91.7", "100.0", "1"]]


def test_categories_that_occur_nowhere_do_not_count(tmp_path):
    truth = write_truth(tmp_path, {1: columns((THING, 10))})
    evaluator, results = evaluate(truth, as_predictions({1: columns((THING, 10))}))
    assert results["All"] == results["Things"] == {"pq": 1, "sq": 1, "rq": 1, "n": 1}
    assert results["Stuff"] == {"pq": 0, "sq": 0, "rq": 0, "n": 0}
    assert evaluator.per_class()["stuff"] == (-1, -1, -1)


def random_pictures(seed, count=5, size=(40, 60)):
    """Images with rectangles of all categories on stuff or void, some of them crowds, and predictions: the same moved
    about, some of another category or left out. (RandomState: its numbers never change.)"""
    rng = np.random.RandomState(seed)
    truth, found = {}, {}
    for image_id in range(1, count + 1):
        pictures = [(np.zeros(size, dtype=np.int64), {}) for _ in range(2)]
        for (ids, infos), background in zip(pictures, rng.rand(2) < [0.6, 0.7]):
            if background:
                ids[:] = 50000
                infos[50000] = {"id": 50000, "category_id": STUFF, "iscrowd": 0}
        crowds = set()
        for number in range(rng.randint(1, 9)):
            x, y, width, height = *rng.randint(0, 40, 2), *rng.randint(3, 30, 2)
            category = (THING, OTHER, STUFF)[rng.randint(3)]
            crowd = int(rng.rand() < 0.15 and category not in crowds)
            crowds |= {category} if crowd else set()
            for (ids, infos), shift in zip(pictures, (0, 3)):
                if shift and rng.rand() < 0.2:
                    continue
                dx, dy = rng.randint(0, shift + 1, 2)
                segment_id = 3 + 77 * number + shift
                ids[y + dy:y + dy + height, x + dx:x + dx + width] = segment_id
                other = category if not shift or rng.rand() < 0.8 else OTHER
                infos[segment_id] = {"id": segment_id, "category_id": other, "iscrowd": 0 if shift else crowd}
        for collected, (ids, infos) in zip((truth, found), pictures):
            present = [{**info, "area": int((ids == number).sum())} for number, info in infos.items()]
            collected[image_id] = ids, [info for info in present if info["area"]]
    return truth, found


# PQ, SQ and RQ of all, things and stuff that panopticapi gives for `random_pictures` of seeds 0 to 5.
PANOPTICAPI = [
    [0.39329727, 0.76839440, 0.50432900, 0.26641398, 0.70773520, 0.39285714, 0.64706384, 0.88971278, 0.72727273],
    [0.36811497, 0.52089400, 0.47142857, 0.26168767, 0.36636274, 0.35714286, 0.58096956, 0.82995652, 0.70000000],
    [0.31533023, 0.70420774, 0.43705628, 0.28780993, 0.67050869, 0.41558442, 0.37037081, 0.77160585, 0.48000000],
    [0.51028397, 0.89448002, 0.58333333, 0.42691258, 0.89036887, 0.50000000, 0.67702676, 0.90270234, 0.75000000],
    [0.28412411, 0.74546288, 0.37875458, 0.26591994, 0.74423981, 0.35384615, 0.32053243, 0.74790901, 0.42857143],
    [0.47597626, 0.72493864, 0.66394336, 0.47893147, 0.77403074, 0.62091503, 0.47006582, 0.62675443, 0.75000000],
]


@pytest.mark.parametrize("seed", range(len(PANOPTICAPI)))
def test_equals_what_panopticapi_gave(tmp_path, seed):
    truth, found = random_pictures(seed)
    results = evaluate(write_truth(tmp_path, truth), as_predictions(found))[1]
    numbers = [results[group][name] for group in ("All", "Things", "Stuff") for name in ("pq", "sq", "rq")]
    assert numbers == pytest.approx(PANOPTICAPI[seed], abs=1e-8)


@pytest.mark.parametrize("seed", range(6, 30))
def test_equals_panopticapi(tmp_path, seed):
    evaluation = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not on PyPI under its own name; "
                                     "the fixed cases above were computed with it")
    truth, found = random_pictures(seed)
    ann_file, ann_folder = write_truth(tmp_path, truth)
    evaluator, results = evaluate((ann_file, ann_folder), as_predictions(found), output_dir=tmp_path / "found")
    theirs = {annotation["image_id"]: annotation
              for annotation in json.loads((tmp_path / "found/predictions.json").read_text())["annotations"]}
    pairs = [(annotation, theirs[annotation["image_id"]])
             for annotation in json.loads(ann_file.read_text())["annotations"]]
    categories = {category["id"]: category for category in CATEGORIES}
    stat = evaluation.pq_compute_single_core(0, pairs, str(ann_folder), str(tmp_path / "found"), categories)
    for group, isthing in (("All", None), ("Things", True), ("Stuff", False)):
        assert results[group] == pytest.approx(stat.pq_average(categories, isthing)[0], abs=1e-12)


def test_batches_and_repeated_images_change_nothing(tmp_path):
    truth, found = random_pictures(1)
    files, predictions = write_truth(tmp_path, truth), as_predictions(found)
    at_once = evaluate(files, predictions)[1]
    assert evaluate(files, *[[prediction] for prediction in reversed(predictions)], predictions[:2])[1] == at_once


def test_only_images_that_were_predicted_count(tmp_path):
    truth = write_truth(tmp_path, {1: columns((THING, 10)), 2: columns((THING, 10))})
    assert evaluate(truth, as_predictions({2: columns((THING, 10))}))[1]["All"]["pq"] == 1
    assert evaluate(truth)[1]["All"] == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


def test_predictions_are_written_only_where_asked(tmp_path):
    truth = write_truth(tmp_path, {1: columns((THING, 10))})
    before = sorted(tmp_path.rglob("*"))
    predictions = as_predictions({1: columns((THING, 4), (STUFF, 6))})
    evaluate(truth, predictions)
    assert sorted(tmp_path.rglob("*")) == before
    evaluate(truth, predictions, output_dir=tmp_path / "out")
    assert (tmp_path / "out/1.png").read_bytes() == predictions[0]["png_string"]
    assert json.loads((tmp_path / "out/predictions.json").read_text()) == {"annotations": [
        {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 1, "category_id": THING},
                                                                {"id": 2, "category_id": STUFF}]}]}
    with pytest.raises(InputError, match="1.json/1.png can't be written"):
        (tmp_path / "1.json").touch()
        evaluate(truth, predictions, output_dir=tmp_path / "1.json")


def test_wrong_predictions_are_our_mistake(tmp_path):
    truth = write_truth(tmp_path, {1: columns((THING, 10))})
    good = as_predictions({1: columns((THING, 4), (STUFF, 6))})[0]

    def refuse(message, **changes):
        with pytest.raises(ValueError, match=message):
            PanopticEvaluator(*truth).update([{**good, **changes}])

    refuse("image id 3 is not in the ground truth", image_id=3)
    refuse("image id 1 has pixels whose id is not among its segments", segments_info=good["segments_info"][:1])
    refuse("image id 1 lists segment id 9, which has no pixel",
           segments_info=[*good["segments_info"], {"id": 9, "category_id": THING}])
    refuse("image id 1 is 8x10 pixels, its ground truth 10x10", png_string=png(np.ones((10, 8), dtype=np.int64)))
    refuse("image id 1 has category_id 5, which is not in", segments_info=[{"id": 1, "category_id": 5}])


def test_missing_ground_truth_is_refused(tmp_path):
    ann_file, ann_folder = write_truth(tmp_path, {1: columns((THING, 10))})
    with pytest.raises(InputError, match="nowhere of the segments' PNGs does not exist"):
        PanopticEvaluator(ann_file, tmp_path / "nowhere")
    (ann_folder / "1.png").unlink()
    with pytest.raises(InputError, match=r"1.png does not exist \(image id 1 of .*panoptic.json\)"):
        PanopticEvaluator(ann_file, ann_folder).update(as_predictions({1: columns((THING, 10))}))


PROGRAM = """
import json, pathlib, sys
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_panoptic_eval import as_predictions, evaluate, random_pictures
from util.distributed import shutdown

rank, folder = int(sys.argv[2]), pathlib.Path(sys.argv[3])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + sys.argv[4], rank=rank, world_size=2)
truth, found = random_pictures(2, count=9)
# Unequal shares that overlap in one image, as when a sampler pads.
mine = {number: picture for number, picture in found.items() if (number <= 4 if rank == 0 else number >= 4)}
results = evaluate((folder / "panoptic.json", folder / "panoptic"), as_predictions(mine), output_dir=folder / "out")[1]
json.dump(results, open(folder / str(rank), "w"))
shutdown()
"""


def test_two_processes_give_exactly_the_result_of_one(tmp_path, root):
    truth, found = random_pictures(2, count=9)
    files = write_truth(tmp_path, truth)
    with socket.socket() as probe:  # a file to meet in can be gone when the second process wants to leave it
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-c", PROGRAM, os.path.dirname(__file__)]
    processes = [subprocess.Popen([*words, str(rank), str(tmp_path), port],
                                  env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
                                  stdout=subprocess.PIPE, text=True) for rank in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = evaluate(files, as_predictions(found))[1]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [expected, expected]
    assert len(printed[0].splitlines()) == 4 and printed[1] == ""
    written = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    assert [annotation["image_id"] for annotation in written] == list(range(1, 10))
