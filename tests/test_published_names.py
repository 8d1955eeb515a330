"""Names of DETR's, Deformable DETR's and UP-DETR's modules, called with the published arguments in the published order."""
import builtins
import importlib
import inspect
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_codec
from pycocotools.cocoeval import COCOeval

from datasets.coco import ConvertCocoPolysToMask, convert_coco_poly_to_mask
from datasets.coco_eval import CocoEvaluator, convert_to_xywh, create_common_coco_eval, evaluate, index_ground_truth, merge
from datasets.coco_panoptic import CocoPanoptic
from datasets.selfdet import (SelfDet, build_selfdet, get_query_transforms, get_random_patch_from_img,
                              make_self_det_transforms)
from util import box_ops, misc
from util.errors import InputError
from util.plot_utils import plot_precision_recall

# By module, its names with their published parameters, in order.
PUBLISHED = {
    "datasets": {"build_dataset": "image_set args", "get_coco_api_from_dataset": "dataset"},
    "datasets.coco": {"build": "image_set args", "CocoDetection": "img_folder ann_file transforms return_masks",
                      "make_coco_transforms": "image_set", "ConvertCocoPolysToMask": "return_masks",
                      "convert_coco_poly_to_mask": "segmentations height width"},
    "datasets.coco_eval": {"CocoEvaluator": "coco_gt iou_types", "convert_to_xywh": "boxes", "merge": "img_ids eval_imgs",
                           "create_common_coco_eval": "coco_eval img_ids eval_imgs"},
    "datasets.coco_panoptic": {"build": "image_set args",
                               "CocoPanoptic": "img_folder ann_folder ann_file transforms return_masks"},
    "datasets.panoptic_eval": {"PanopticEvaluator": "ann_file ann_folder output_dir"},
    "datasets.selfdet": {"SelfDet": "root detection_transform query_transform num_patches",
                         "get_random_patch_from_img": "img min_pixel", "build_selfdet": "image_set args p",
                         "make_self_det_transforms": "image_set", "get_query_transforms": "image_set"},
    "datasets.transforms": {
        "crop": "image target region", "hflip": "image target", "resize": "image target size max_size",
        "pad": "image target padding", "RandomCrop": "size", "RandomSizeCrop": "min_size max_size", "CenterCrop": "size",
        "RandomHorizontalFlip": "p", "RandomResize": "sizes max_size", "RandomPad": "max_pad", "ToTensor": "",
        "Normalize": "mean std", "Compose": "transforms"},
    "util.misc": {
        "SmoothedValue": "window_size fmt", "MetricLogger": "delimiter", "all_gather": "data",
        "reduce_dict": "input_dict average", "get_sha": "", "collate_fn": "batch", "_max_by_axis": "the_list",
        "NestedTensor": "tensors mask", "nested_tensor_from_tensor_list": "tensor_list",
        "setup_for_distributed": "is_master", "is_dist_avail_and_initialized": "", "get_world_size": "", "get_rank": "",
        "get_local_size": "", "get_local_rank": "", "is_main_process": "", "init_distributed_mode": "args",
        "accuracy": "output target topk", "interpolate": "input size scale_factor mode align_corners",
        "get_total_grad_norm": "parameters norm_type", "inverse_sigmoid": "x eps"},
    "util.box_ops": {"box_cxcywh_to_xyxy": "", "box_xyxy_to_cxcywh": "", "box_iou": "boxes1 boxes2",
                     "generalized_box_iou": "boxes1 boxes2", "masks_to_boxes": "masks", "box_area": "boxes"},
    "util.plot_utils": {"plot_logs": "logs fields ewm_col log_name", "plot_precision_recall": "files naming_scheme"},
    "engine": {"train_one_epoch": "model criterion data_loader optimizer device epoch max_norm",
               "evaluate": "model criterion postprocessors data_loader base_ds device output_dir"},
    "main": {"get_args_parser": "", "main": "args"},
    "hubconf": {**{name: "pretrained num_classes return_postprocessor" for name in (
                    "detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5")},
                **{name: "pretrained num_classes threshold return_postprocessor" for name in (
                    "detr_resnet50_panoptic", "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic")}},
}


@pytest.mark.parametrize("module", PUBLISHED)
def test_names_and_the_order_of_arguments(module):
    for name, parameters in PUBLISHED[module].items():
        value = getattr(importlib.import_module(module), name)
        own = [parameter.name for parameter in inspect.signature(value).parameters.values()
               if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        wanted = parameters.split()
        assert own[:len(wanted)] == wanted, f"{module}.{name}"


# datasets.coco


def test_targets_of_annotations():
    annotations = [
        {"bbox": [10, 5, 20, 10], "category_id": 3, "area": 150, "iscrowd": 0, "keypoints": [11, 6, 2, 0, 0, 0],
         "segmentation": [[10, 5, 30, 5, 30, 15, 10, 15]]},
        {"bbox": [70, 5, 20, 10], "category_id": 4, "area": 200, "keypoints": [71, 6, 2, 0, 0, 0],
         "segmentation": [[70, 5, 80, 5, 80, 15, 70, 15]]},
        {"bbox": [1, 1, 0, 10], "category_id": 5, "area": 0, "iscrowd": 0, "keypoints": [0] * 6,
         "segmentation": [[1, 1, 1, 1, 1, 11]]},
        {"bbox": [0, 0, 80, 60], "category_id": 6, "area": 9, "iscrowd": 1, "segmentation": [[0, 0, 80, 0, 80, 60]]}]
    picture = Image.new("RGB", (80, 60))
    image, target = ConvertCocoPolysToMask(True)(picture, {"image_id": 17, "annotations": annotations})
    assert image is picture and target["image_id"].tolist() == [17]
    assert target["boxes"].tolist() == [[10, 5, 30, 15], [70, 5, 80, 15]]   # clipped; without the empty one and the crowd
    assert target["labels"].tolist() == [3, 4] and target["area"].tolist() == [150, 200]
    assert target["iscrowd"].tolist() == [0, 0] and target["keypoints"].shape == (2, 2, 3)
    assert target["orig_size"].tolist() == target["size"].tolist() == [60, 80]
    assert target["masks"].shape == (2, 60, 80) and target["masks"].flatten(1).sum(1).tolist() == [200, 100]
    _, empty = ConvertCocoPolysToMask()(picture, {"image_id": torch.tensor([2]), "annotations": []})
    assert empty["boxes"].shape == (0, 4) and empty["labels"].dtype == torch.int64 and "masks" not in empty
    assert convert_coco_poly_to_mask([], 6, 8).shape == (0, 6, 8)
    assert convert_coco_poly_to_mask([[[0, 0, 4, 0, 4, 3, 0, 3]]], 6, 8).sum() == 12


def test_size_of_a_panoptic_image(tmp_path):
    (tmp_path / "pngs").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "2.png")
    images = [{"id": 1, "file_name": "1.png", "width": 80, "height": 60}, {"id": 2, "file_name": "2.png"}]
    for number in (1, 2):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"pngs/{number}.png")
    segment = {"category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    content = {"images": images, "categories": [{"id": 1, "name": "sky", "isthing": 0}], "annotations": [
        {"image_id": number, "file_name": f"{number}.png", "segments_info": [{**segment, "id": number}]}
        for number in (1, 2)]}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    dataset = CocoPanoptic(tmp_path, tmp_path / "pngs", tmp_path / "panoptic.json", None, True)
    assert dataset.get_height_and_width(0) == (60, 80) and dataset.get_height_and_width(1) == (30, 40)


# datasets.coco_eval


def ground_truth(num_images=3):
    return index_ground_truth({
        "images": [{"id": number, "height": 60, "width": 80} for number in range(num_images)],
        "annotations": [{"id": number + 1, "image_id": number, "category_id": 1, "bbox": [10, 10, 20, 20], "area": 400,
                         "iscrowd": 0} for number in range(num_images)], "categories": [{"id": 1, "name": "cat"}]})


def found(left):
    masks = torch.zeros(1, 60, 80)
    masks[0, 10:30, int(left):int(left) + 20] = 1
    return {"scores": torch.tensor([0.5]), "labels": torch.tensor([1]), "masks": masks,
            "boxes": torch.tensor([[left, 10.0, left + 20, 30.0]]), "keypoints": torch.tensor([[[1.0, 2.0, 2.0]]])}


def test_entries_of_results_files():
    evaluator = CocoEvaluator(ground_truth(), ("bbox", "segm"))
    predictions = {0: found(10.0), 2: found(12.0), 1: {}}
    boxes = evaluator.prepare_for_coco_detection(predictions)
    assert boxes == evaluator.prepare(predictions, "bbox") == [
        {"image_id": 0, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.5},
        {"image_id": 2, "category_id": 1, "bbox": [12, 10, 20, 20], "score": 0.5}]
    masks = evaluator.prepare_for_coco_segmentation(predictions)
    assert [entry["image_id"] for entry in masks] == [0, 2] and json.dumps(masks)
    assert mask_codec.decode(masks[0]["segmentation"]).sum() == 400
    assert evaluator.prepare_for_coco_keypoint(predictions)[1] == {
        "image_id": 2, "category_id": 1, "keypoints": [1, 2, 2], "score": 0.5}


def test_an_evaluation_in_parts_is_one_evaluation():
    """The results of two processes, with an image that both had, give the figures of one."""
    truth = ground_truth()
    predictions = {number: found(10.0 + 3 * number) for number in range(3)}
    evaluator = CocoEvaluator(truth, ["bbox"])
    detections = truth.loadRes(evaluator.prepare_for_coco_detection(predictions))

    def part(ids):
        evaluation = COCOeval(truth, detections, "bbox")
        evaluation.params.imgIds = ids
        return evaluate(evaluation)
    first, second = part([0, 2]), part([1, 2])
    assert first[1].shape == (1, 4, 2)
    ids, results = merge([*first[0], *second[0]], np.concatenate([first[1], second[1]], axis=2))
    assert ids.tolist() == [0, 1, 2] and results.shape == (1, 4, 3)
    whole = COCOeval(truth, detections, "bbox")
    create_common_coco_eval(whole, ids, results)
    whole.accumulate()
    evaluator.update(predictions)
    evaluator.accumulate()
    evaluator.summarize()
    whole.summarize()
    np.testing.assert_allclose(whole.stats, evaluator.coco_eval["bbox"].stats[:12])
    assert convert_to_xywh(torch.tensor([[1.0, 2.0, 5.0, 9.0]])).tolist() == [[1, 2, 4, 7]]


# datasets.selfdet


def test_patches_to_find(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.new("RGB", (15, 90)).save(tmp_path / "b.png")   # too small
    (tmp_path / "c.png").write_bytes(b"")
    for image_set in ("train", "val"):
        dataset = build_selfdet(image_set, SimpleNamespace(num_patches=4), tmp_path)
        for index in range(3):
            image, patches, target = dataset[index]
            assert patches.shape == (4, 3, 128, 128) and patches.dtype == image.dtype == torch.float32
            assert image.shape[0] == 3 and 320 <= min(image.shape[1:]) <= 480 and max(image.shape[1:]) <= 600
            assert target["image_id"].tolist() == [0] and target["labels"].tolist() == [1] * 4
            assert (target["boxes"] > 0).all() and (target["boxes"] < 1).all()
            assert target["orig_size"].tolist() == [60, 90] and target["size"].tolist() == list(image.shape[1:])
    np.random.seed(1)
    sizes = set()
    for _ in range(300):
        patch, x, y, w, h = get_random_patch_from_img(Image.fromarray(noise), 8)
        assert np.array_equal(np.asarray(patch), noise[y:y + h, x:x + w])
        sizes |= {("w", w), ("h", h)}
    assert min(w for side, w in sizes if side == "w") == 8 and max(w for side, w in sizes if side == "w") == 82
    assert max(h for side, h in sizes if side == "h") == 52
    with pytest.raises(ValueError, match="15x90 pixels"):
        get_random_patch_from_img(Image.new("RGB", (15, 90)))
    own = SelfDet(tmp_path, lambda image, target: (image, target), lambda patch: torch.zeros(3, 2, 2), 2)
    assert own[0][0].size == (90, 60) and own[0][1].shape == (2, 3, 2, 2)
    for maker in (make_self_det_transforms, get_query_transforms):
        with pytest.raises(ValueError, match="'test'"):
            maker("test")


# util


def test_printing_and_saving_on_the_main_process(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builtins, "print", builtins.print)
    misc.setup_for_distributed(False)
    print("nothing")
    print("shown", force=True)
    misc.setup_for_distributed(True)
    print("main")
    assert capsys.readouterr().out == "shown\nmain\n"
    misc.save_on_master({"epoch": 3}, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True) == {"epoch": 3}
    file = io.BytesIO()
    misc.save_on_master({"epoch": 4}, file)
    assert file.getvalue()
    monkeypatch.setattr("util.published.is_main_process", lambda: False)
    misc.save_on_master({}, tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


def test_norm_of_all_gradients():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, 2)), torch.nn.Parameter(torch.zeros(1))]
    assert misc.get_total_grad_norm(parameters) == 0
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([[0.0, -4.0]])
    assert misc.get_total_grad_norm(parameters, 2) == 5 and misc.get_total_grad_norm(iter(parameters), float("inf")) == 4


def test_processes_of_a_node(monkeypatch):
    assert misc.get_local_size() == 1 and misc.get_local_rank() == 0
    monkeypatch.setattr("util.published.get_world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert misc.get_local_size() == 2


def test_small_helpers():
    assert misc._max_by_axis([[3, 1, 7], [2, 5, 6]]) == [3, 5, 7]
    assert str(misc.SmoothedValue(20, None)) == "nan (nan)" or misc.SmoothedValue(20, None).fmt
    meter = misc.SmoothedValue(window_size=1, fmt="{value:.1f}")
    meter.update(2.0, 3)
    assert str(meter) == "2.0"
    samples, targets = misc.collate_fn([(torch.ones(3, 2, 4), {"a": 1}), (torch.ones(3, 3, 2), {"a": 2})])
    assert samples.tensors.shape == (2, 3, 3, 4) and samples.decompose()[1].sum() == 4 + 6 and targets[1] == {"a": 2}
    assert misc.interpolate(torch.ones(1, 1, 2, 2), (4, 4)).shape == (1, 1, 4, 4)
    assert misc.accuracy(torch.tensor([[0.1, 0.9]]), torch.tensor([1]))[0] == 100
    assert misc.reduce_dict({"a": torch.tensor(2.0)}, True)["a"] == 2
    iou, union = box_ops.box_iou(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 2]]))
    assert iou.item() == pytest.approx(1 / 3) and union.item() == 6


def test_names_of_precision_recall_curves(tmp_path):
    tables = {"precision": torch.ones(10, 101, 1, 4, 3), "scores": torch.ones(10, 101, 1, 4, 3)}
    for run in ("one", "two"):
        (tmp_path / run / "eval").mkdir(parents=True)
        torch.save(tables, tmp_path / run / "eval" / "latest.pth")
    files = [tmp_path / run / "eval" / "latest.pth" for run in ("one", "two")]
    for scheme, names in (("exp_id", ["one", "two"]), ("iter", ["latest", "latest"])):
        figure, axes = plot_precision_recall(files, scheme)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    with pytest.raises(InputError, match="^the naming scheme 'name' is neither 'exp_id' nor 'iter'$"):
        plot_precision_recall(files, "name")
