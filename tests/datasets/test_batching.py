"""What goes together in a batch: in evaluation nothing is padded, and nothing depends on the batches."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import main as program
from datasets import build_dataset, file_sizes, get_coco_api_from_dataset, shown_sizes
from datasets.batching import aspect_groups, equal_size_batches, padding_share
from engine import evaluate
from models import build_model
from util.errors import InputError

SIZES = [(48, 64), (64, 48), (48, 64), (96, 128), (50, 64), (48, 64), (48, 48), (64, 48)]   # height, width


@pytest.fixture
def coco(tmp_path):
    """Images of noise in COCO's layout, training and validation alike; those of 96 x 128 are shown as those of 48 x 64."""
    rng = np.random.default_rng(0)
    for part in ("train2017", "val2017"):
        (tmp_path / part).mkdir()
        images, annotations = [], []
        for number, (height, width) in enumerate(SIZES, start=1):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
            annotations += [{"id": 2 * number + k, "image_id": number, "category_id": 1 + k, "iscrowd": 0, "area": 400,
                             "bbox": [x, 4, 20, 20], "segmentation": [[x, 4, x + 20, 4, x + 20, 24, x, 24]]}
                            for k, x in ((0, 4), (1, 12))[:number % 3]]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{part}.json").write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": [{"id": k, "name": f"c{k}"} for k in (1, 2)]}))
    return tmp_path


def test_batches_hold_images_of_one_size_and_each_image_once():
    sizes = torch.tensor(SIZES)
    assert equal_size_batches(sizes, 8, 2) == [[0, 2], [1, 7], [3], [4], [5], [6]]
    assert equal_size_batches(sizes, 8, 4) == [[0, 2, 5], [1, 7], [3], [4], [6]]
    assert equal_size_batches(None, 3, 2) == [[0], [1], [2]]
    assert padding_share([[SIZES[i] for i in batch] for batch in equal_size_batches(sizes, 8, 4)]) == 0


def test_padding_share_by_hand():
    # 48 x 64 beside 64 x 48 fill 2 * 3072 of 2 * 4096 pixels; the image alone fills its own 4096.
    assert padding_share([[(48, 64), (64, 48)], [(64, 64)]]) == pytest.approx(2048 / 12288)


def test_groups_are_portraits_squares_and_landscapes():
    sizes = torch.tensor([(640, 480), (480, 480), (480, 500), (427, 640), (1000, 200)])
    assert aspect_groups(sizes).tolist() == [0, 1, 1, 2, 0]


def test_sizes_are_known_before_loading(coco, tiny_args):
    args = tiny_args(coco_path=str(coco), val_size=48, max_size=80, num_classes=3)
    dataset = build_dataset("val", args)
    assert shown_sizes(dataset).tolist() == [list(dataset[i][0].shape[1:]) for i in range(len(SIZES))]
    assert shown_sizes(torch.utils.data.Subset(dataset, [6, 0])).tolist() == [[48, 48], [48, 64]]
    assert shown_sizes(build_dataset("train", args)) is None   # random there
    for image in dataset.coco.imgs.values():   # not annotated: read from the files
        del image["width"], image["height"]
    assert file_sizes(dataset).tolist() == [list(size) for size in SIZES]


def test_sizes_of_a_pretext_evaluation(coco, tiny_args):
    args = tiny_args(pretraining=True, imagenet_path=str(coco / "val2017"), pretrain_sizes=[32, 40], patch_size=16,
                     num_classes=None)
    dataset = build_dataset("val", args)
    assert shown_sizes(dataset).tolist() == [list(dataset[i][0].shape[1:]) for i in range(len(SIZES))]
    assert shown_sizes(build_dataset("train", args)) is None


@pytest.mark.parametrize("changes", [dict(backbone="resnet50", dilation=True), dict(masks=True),
                                     dict(model="deformable_detr", hidden_dim=64, two_stage=True)])
def test_evaluation_does_not_depend_on_the_batch_size(coco, tiny_args, changes):
    """DC5 is the model that suffers most from padding."""
    found, averages = [], []
    for batch_size in (1, 2, 3):
        args = tiny_args(coco_path=str(coco), val_size=48, max_size=80, num_classes=3, num_workers=0,
                         batch_size=batch_size, **changes)
        if not found:
            model, criterion, postprocessors = build_model(args)
        dataset = build_dataset("val", args)
        loader = program.build_val_loader(dataset, args)
        assert max(len(batch) for batch in loader.batch_sampler) == batch_size
        model.eval()
        with torch.no_grad():
            outputs = {int(target["image_id"]): {name: values[i] for name, values in predicted.items()
                                                 if isinstance(values, torch.Tensor)}
                       for images, targets in loader for predicted in [model(images)] for i, target in enumerate(targets)}
        found.append(outputs)
        averages.append(evaluate(model, criterion, {"bbox": postprocessors["bbox"]}, loader,
                                 get_coco_api_from_dataset(dataset), torch.device("cpu"))[0])
    for outputs, stats in zip(found[1:], averages[1:]):
        torch.testing.assert_close(outputs, found[0], atol=1e-5, rtol=1e-5)
        for name in ("coco_eval_bbox", "coco_eval_bbox_per_class"):
            assert stats.pop(name) == averages[0][name]
        for name, value in stats.items():
            assert value == pytest.approx(averages[0][name], rel=1e-4, abs=1e-4), name


def test_training_batches_grouped_by_aspect(coco, tiny_args):
    args = tiny_args(coco_path=str(coco), num_classes=3, num_workers=0, group_by_aspect=True, train_sizes=[32],
                     crop_resize=[40], crop_size=[30, 40])
    dataset = build_dataset("train", args)
    groups = aspect_groups(file_sizes(dataset))
    batches = list(program.build_train_loader(dataset, args).batch_sampler)
    assert len(batches) == 3 and all(len(set(groups[batch].tolist())) == 1 for batch in batches)   # 5, 2 and 1 images


def test_grouping_by_aspect_is_refused_where_there_are_no_annotations(tiny_args):
    with pytest.raises(InputError, match="--group_by_aspect has no effect with --dataset_file imagenet"):
        tiny_args(pretraining=True, group_by_aspect=True)


def test_workers_that_live_on_give_the_samples_of_a_fresh_loader(coco, tiny_args):
    def epochs(fresh):
        args = tiny_args(coco_path=str(coco), num_classes=3, num_workers=2, train_sizes=[32, 40], crop_resize=[40],
                         crop_size=[30, 40])
        args.resolved = True
        dataset = build_dataset("train", args)
        loader, seen = program.build_train_loader(dataset, args), []
        assert loader.persistent_workers
        for epoch in (0, 1):
            loader = program.build_train_loader(dataset, args) if fresh else loader
            loader.batch_sampler.set_epoch(epoch)
            dataset.set_epoch(epoch)
            seen.append([(images.tensors, [target["boxes"] for target in targets]) for images, targets in loader])
        return seen

    lasting = epochs(fresh=False)
    torch.testing.assert_close(lasting, epochs(fresh=True), rtol=0, atol=0)
    assert any(one[0].shape != two[0].shape or not torch.equal(one[0], two[0]) for one, two in zip(*lasting))
