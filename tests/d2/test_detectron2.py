"""The wrapper inside the real Detectron2: the same numbers as this project's own programs, and training."""
import json
import re
import shlex
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2", reason="Detectron2 is not installed (d2/README.md says how to get it)")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks  # noqa: E402
from pycocotools import mask as mask_codec  # noqa: E402

from commands import ROOT, SMALL_COCO, run  # noqa: E402
from d2 import train_net  # noqa: E402
from d2.converter import COCO_IDS, config_options, convert  # noqa: E402
from d2.detr import Detr, DetrDatasetMapper, add_detr_config  # noqa: E402
from d2.detr.solver import build_optimizer  # noqa: E402
from datasets.coco import CocoDetection, class_names, make_coco_transforms, read_ground_truth  # noqa: E402
from datasets.toy import ToySettings, write_toy  # noqa: E402
from main import get_args_parser  # noqa: E402
from models import build_model  # noqa: E402
from util import recipes  # noqa: E402
from util.box_ops import box_cxcywh_to_xyxy  # noqa: E402
from util.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from util.errors import InputError  # noqa: E402

BOX, MASKS = (str(ROOT / "d2" / "configs" / f"{name}_256_6_6_torchvision.yaml") for name in ("detr", "detr_segm"))
SMALL_IMAGES = ["INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "128", "INPUT.MIN_SIZE_TRAIN", "(80,96)",
                "INPUT.MAX_SIZE_TRAIN", "128", "INPUT.CROP.SIZE", "(46,72)", "DATALOADER.NUM_WORKERS", "0"]
UNUSED = -30.0  # logit of an output that no category has: far below the others, as training leaves it


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO-format set of a few small images."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=0, num_train=8, num_val=5))
    return folder / "coco"


def config(file: str, *options: Any) -> Any:
    """A config for the CPU with options."""
    cfg = get_cfg()
    add_detr_config(cfg)
    cfg.merge_from_file(file)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *map(str, options)])
    return cfg


def suppress(classifier: torch.nn.Linear, category_ids: List[int]) -> None:
    """Make the outputs without category as unlikely as training makes them."""
    unused = sorted(set(range(len(classifier.bias) - 1)) - set(category_ids))
    with torch.no_grad():
        classifier.weight[unused] = 0
        classifier.bias[unused] = UNUSED


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Give every buffer of a frozen normalisation values of its own, so that a mistaken name shows."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith(("weight", "running_var")):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
        elif name.endswith(("bias", "running_mean")):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model


MODELS = [{}, {"pre_norm": True, "backbone_last_layer": "layer3"}, {"backbone": "resnet50"},
          {"backbone": "resnet50", "dilation": True}]


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
@pytest.mark.parametrize("changes", MODELS, ids=["resnet18", "pre-norm layer3", "resnet50", "resnet50 DC5"])
def test_a_converted_model_gives_the_same_outputs(tiny_args: Any, images: List[Tensor], changes: Dict[str, Any],
                                                  masks: bool) -> None:
    """Both models on a padded batch; its category ids leave two of five outputs out."""
    args = tiny_args(**changes, masks=masks)
    model = randomised(build_model(args)[0]).eval()
    inner = model.detr if masks else model
    state, ids = model.state_dict(), [1, 2, 4]
    options = config_options({"args": vars(args)}, state, len(ids), masks)
    detectron = Detr(config(MASKS if masks else BOX, *options)).eval()
    detectron.load_state_dict(convert(state, ids))  # strictly
    with torch.no_grad():
        ours, theirs = model(images), detectron.detr(images)
    assert inner.class_embed.out_features == 6 and theirs["pred_logits"].shape[-1] == 4
    torch.testing.assert_close(theirs["pred_logits"], ours["pred_logits"][..., [1, 2, 4, 5]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs["pred_boxes"], ours["pred_boxes"], rtol=1e-4, atol=1e-5)
    if masks:
        torch.testing.assert_close(theirs["pred_masks"], ours["pred_masks"], rtol=1e-3, atol=1e-3)


def test_ids_of_coco_are_detectron2s() -> None:
    metadata = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert sorted(metadata, key=metadata.get) == COCO_IDS


@pytest.fixture(scope="module")
def checkpoints(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """A box and a mask model as `main.py` would leave them, both converted by the program, and what it says to type."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: Dict[str, Any] = {}
    names = class_names(read_ground_truth(toy / "annotations/instances_val2017.json"))
    for kind, flags in (("boxes", []), ("masks", ["--masks"])):
        words = [*SMALL_COCO, *f"--load_backbone none --device cpu --num_classes {max(names) + 1}".split(), *flags]
        args = recipes.resolve(get_args_parser().parse_args([*words, "--coco_path", str(toy)]))
        torch.manual_seed(3)
        model, _, postprocessors = build_model(args)
        suppress((randomised(model).detr if flags else randomised(model)).class_embed, list(names))
        plain = {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float, bool))}
        made[kind], made[f"{kind} converted"] = folder / f"{kind}.pth", folder / f"{kind}_d2.pth"
        made[f"{kind} built"] = model.eval(), postprocessors
        save_checkpoint({"model": model.state_dict(), "class_names": names, "args": plain}, str(made[kind]))
        done = run(["d2/converter.py", "--source_model", made[kind], "--output_model", made[f"{kind} converted"]])
        made[f"{kind} told"] = shlex.split(done.stdout.split("arguments for train_net.py: ")[1])
    return made


@pytest.fixture(scope="module")
def evaluated(toy: Path, checkpoints: Dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Any]:
    """What `main.py --eval` and `train_net.py --eval-only` print, and the detections that the latter wrote."""
    results: Dict[str, Any] = {}
    for kind, flags in (("boxes", []), ("masks", ["--masks"])):
        out = tmp_path_factory.mktemp(kind)
        own = ["main.py", "--eval", "--batch_size", "1", *SMALL_COCO, "--num_workers", "0", *flags]
        results[f"main {kind}"] = run([*own, "--coco_path", toy, "--resume", checkpoints[kind]]).stdout
        detectron = ["d2/train_net.py", "--num-gpus", "0", "--coco-path", toy, "--eval-only"]
        told = checkpoints[f"{kind} told"]
        results[kind] = run([*detectron, *told, *SMALL_IMAGES, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", out]).stdout
        results[f"{kind} found"] = json.loads((out / "inference" / "coco_instances_results.json").read_text())
    return results


def coco_numbers(text: str) -> List[List[float]]:
    """The tables of twelve COCO numbers in a program's output."""
    numbers = [float(found) for found in re.findall(r"Average (?:Precision|Recall) .*\] = (-?[\d.]+)", text)]
    return [numbers[i:i + 12] for i in range(0, len(numbers), 12)]


@pytest.mark.parametrize("kind, tables", [("boxes", 1), ("masks", 2)])
def test_evaluation_prints_the_same_coco_numbers(evaluated: Dict[str, Any], kind: str, tables: int) -> None:
    theirs, ours = coco_numbers(evaluated[kind]), coco_numbers(evaluated[f"main {kind}"])
    assert len(ours) == len(theirs) == tables
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, abs=1.1e-3)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_evaluation_finds_the_same_with_the_same_scores(toy: Path, checkpoints: Dict[str, Any],
                                                        evaluated: Dict[str, Any], kind: str) -> None:
    model, postprocessors = checkpoints[f"{kind} built"]
    dataset = CocoDetection(toy / "val2017", toy / "annotations/instances_val2017.json",
                            make_coco_transforms("val", val_size=96, max_size=128))
    found = evaluated[f"{kind} found"]
    assert len(found) == 100 * len(dataset)
    for image, target in dataset:
        size = target["orig_size"][None]
        with torch.no_grad():
            outputs = model([image])
        expected = postprocessors["bbox"](outputs, size)
        if kind == "masks":
            expected = postprocessors["segm"](expected, outputs, size, target["size"][None])
        mine = [item for item in found if item["image_id"] == int(target["image_id"])]
        boxes = torch.tensor([item["bbox"] for item in mine])
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, expected[0]["boxes"], rtol=1e-4, atol=1e-3)
        scores = torch.tensor([item["score"] for item in mine])
        torch.testing.assert_close(scores, expected[0]["scores"], rtol=1e-4, atol=1e-5)
        assert [item["category_id"] for item in mine] == expected[0]["labels"].tolist()
        if kind == "masks":
            masks = torch.from_numpy(mask_codec.decode([item["segmentation"] for item in mine])).permute(2, 0, 1) > 0
            assert (masks == expected[0]["masks"][:, 0]).float().mean() > 0.999 and 0.01 < masks.float().mean() < 0.99


TRAINING = ("SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 3 SOLVER.STEPS (2,) SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 0 "
            "MODEL.DEVICE cpu").split()


def test_training_boxes_then_masks_on_top_of_them(toy: Path, checkpoints: Dict[str, Any], tmp_path: Path) -> None:
    """Three steps of the detector, a resumption, then a mask head on the frozen result, which stays bit-equal."""
    told = checkpoints["boxes told"]  # it begins with the config and the weights
    command = ["d2/train_net.py", "--num-gpus", "0", "--coco-path", toy]
    training = [*told, *SMALL_IMAGES, *TRAINING, "OUTPUT_DIR", tmp_path / "box"]
    run([*command, *training])
    before = load_checkpoint(str(checkpoints["boxes converted"]))["model"]
    trained = load_checkpoint(str(tmp_path / "box" / "model_final.pth"))["model"]
    assert set(trained) == set(before)
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert "detr.class_embed.weight" in moved and "detr.backbone.0.body.net.res3.0.conv1.weight" in moved
    assert not any(".stem." in name or ".res2." in name or "norm.running" in name for name in moved)
    log = json.loads((tmp_path / "box" / "metrics.json").read_text().splitlines()[0])
    assert {"total_loss", "loss_ce", "loss_giou_0", "class_error", "lr"} <= set(log)
    resumed = run([*command, "--resume", *training, "SOLVER.MAX_ITER", "4"])
    assert "Starting training from iteration 3" in resumed.stdout

    run([*command, "--config-file", MASKS, "MODEL.DETR.FROZEN_WEIGHTS", tmp_path / "box" / "model_final.pth",
         *told[4:], *SMALL_IMAGES, *TRAINING, "OUTPUT_DIR", tmp_path / "masks"])
    box = load_checkpoint(str(tmp_path / "box" / "model_final.pth"))["model"]
    masks = load_checkpoint(str(tmp_path / "masks" / "model_final.pth"))["model"]
    inner = {name.removeprefix("detr."): value for name, value in masks.items()}
    frozen = {name: value for name, value in inner.items() if name.startswith("detr.")}
    assert set(frozen) == set(box) and all(torch.equal(frozen[name], box[name]) for name in box)
    assert any(name.startswith("mask_head.") for name in inner)


def test_an_updetr_pretraining_starts_a_fine_tuning(tiny_args: Any) -> None:
    args = tiny_args(pretraining=True, pre_norm=True)
    state = build_model(args)[0].state_dict()
    model = Detr(config(BOX, *config_options({"args": vars(args)}, state, None)))
    differing = model.load_state_dict(convert(state, None), strict=False)
    assert differing.missing_keys == ["detr.class_embed.weight", "detr.class_embed.bias"]
    assert differing.unexpected_keys == []


def test_evaluating_weights_that_do_not_fit_is_refused(toy: Path, checkpoints: Dict[str, Any], tmp_path: Path) -> None:
    command = ["d2/train_net.py", "--num-gpus", "0", "--coco-path", toy, "--eval-only", "MODEL.DEVICE", "cpu"]
    done = run([*command, "MODEL.WEIGHTS", checkpoints["boxes converted"], "OUTPUT_DIR", tmp_path], check=False)
    assert done.returncode == 2
    assert "error: MODEL.WEIGHTS doesn't fit the model that the config describes: " in done.stderr


@pytest.mark.parametrize("words, sentence", [
    (["--coco-path", "TOY", "--eval-only", "MODEL.DETR.NUM_CLASSES", "3"],
     "MODEL.DETR.NUM_CLASSES 3 isn't the 7 of data set own_val"),
    (["MODEL.DETR.QUERIES", "3"], "an option on the command line: Non-existent key: MODEL.DETR.QUERIES"),
    (["DATASETS.TRAIN", "('mine',)"], "DATASETS: mine is not registered (--coco-path DIR registers a folder)"),
    (["--coco-path", "TOY", "MODEL.DETR.FROZEN_WEIGHTS", "f.pth", "MODEL.WEIGHTS", ""],
     "MODEL.DETR.FROZEN_WEIGHTS has no effect without MODEL.MASK_ON"),
    (["--coco-path", "TOY", "MODEL.MASK_ON", "True", "MODEL.DETR.FROZEN_WEIGHTS", "f.pth", "MODEL.WEIGHTS", "w.pth"],
     "MODEL.WEIGHTS w.pth would overwrite MODEL.DETR.FROZEN_WEIGHTS; set it to ''"),
])
def test_options_that_contradict_each_other_or_the_data(toy: Path, words: List[str], sentence: str) -> None:
    arguments = train_net.get_args_parser().parse_args([str(toy) if word == "TOY" else word for word in words])
    with pytest.raises(InputError, match=re.escape(sentence)):
        train_net.setup(arguments)


def test_rates_and_clipping_of_the_optimizer(tiny_args: Any) -> None:
    args = tiny_args()
    options = config_options({"args": vars(args)}, build_model(args)[0].state_dict(), 3)
    cfg = config(BOX, *options, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5, "SOLVER.BACKBONE_MULTIPLIER", 0.2)
    model = Detr(cfg)
    optimizer = build_optimizer(cfg, model)
    groups = {(round(group["lr"], 8), group["weight_decay"]) for group in optimizer.param_groups}
    assert groups == {(1e-4, 1e-4), (2e-5, 1e-4)}
    backbone = {id(parameter) for parameter in model.detr.backbone.parameters() if parameter.requires_grad}
    slow = {id(parameter) for group in optimizer.param_groups if group["lr"] < 1e-4 for parameter in group["params"]}
    assert slow == backbone and len(backbone) > 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-2)
    with pytest.raises(InputError, match="SOLVER.OPTIMIZER ADAM is not one of ADAMW, SGD"):
        build_optimizer(config(BOX, *options, "SOLVER.OPTIMIZER", "ADAM"), model)


def small_cfg(tiny_args: Any, file: str = BOX, *more: Any) -> Any:
    args = tiny_args(masks=file == MASKS)
    return config(file, *config_options({"args": vars(args)}, build_model(args)[0].state_dict(), 4), *more)


def test_the_mapper_gives_what_main_py_trains_on(toy: Path, tiny_args: Any) -> None:
    """A test image byte for byte; a training image with its objects, however it was cut and flipped."""
    dataset = CocoDetection(toy / "val2017", toy / "annotations/instances_val2017.json",
                            make_coco_transforms("val", val_size=96, max_size=128), return_masks=True)
    raw = dataset.coco.loadAnns(dataset.coco.getAnnIds(dataset.ids[0]))
    entry = dataset.coco.imgs[dataset.ids[0]]
    record = {**entry, "file_name": str(toy / "val2017" / entry["file_name"]),
              "annotations": [{"bbox": item["bbox"], "bbox_mode": 1, "category_id": item["category_id"] - 1,
                               "segmentation": item["segmentation"], "iscrowd": item["iscrowd"]} for item in raw]}
    cfg = small_cfg(tiny_args, MASKS, *SMALL_IMAGES)
    model, (image, target) = Detr(cfg), dataset[0]
    mapped = DetrDatasetMapper(cfg, is_train=False)(record)
    assert mapped["image"].dtype == torch.uint8 and "annotations" not in mapped and "annotations" in record
    torch.testing.assert_close((mapped["image"] - model.pixel_mean) / model.pixel_std, image, rtol=1e-5, atol=1e-5)
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", "False"])
    mapped = DetrDatasetMapper(cfg, is_train=True)(record)
    trained_on = model._target(mapped["instances"])
    torch.testing.assert_close(trained_on["boxes"], target["boxes"])
    assert torch.equal(trained_on["labels"], target["labels"] - 1) and torch.equal(trained_on["masks"], target["masks"])
    cfg.merge_from_list(["INPUT.FORMAT", "BGR"])
    assert torch.equal(DetrDatasetMapper(cfg, is_train=True)(record)["image"].flip(0), mapped["image"])
    with pytest.raises(InputError, match="but its annotations say 95x"):
        DetrDatasetMapper(cfg)({**record, "width": 95})
    with pytest.raises(InputError, match="without segmentation, which MODEL.MASK_ON needs"):
        DetrDatasetMapper(cfg)({**record, "annotations": [record["annotations"][0], {"bbox": [0, 0, 2, 2]}]})


def test_instances_become_targets_whatever_their_masks_are_kept_as(tiny_args: Any) -> None:
    model = Detr(small_cfg(tiny_args, MASKS))
    boxes = torch.tensor([[8.0, 4.0, 24.0, 12.0]])
    polygons = PolygonMasks([[[8.0, 4.0, 24.0, 4.0, 24.0, 12.0, 8.0, 12.0]]])
    drawn = BitMasks.from_polygon_masks(polygons, 16, 32)
    for masks in (polygons, drawn):
        target = model._target(Instances((16, 32), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([3]), gt_masks=masks))
        assert target["boxes"].tolist() == [[0.5, 0.5, 0.5, 0.5]] and torch.equal(target["masks"], drawn.tensor)
        assert int(target["masks"].sum()) == 16 * 8
    nothing = model._target(Instances((16, 32), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long()))
    assert nothing["masks"].shape == (0, 16, 32) and nothing["masks"].dtype == torch.bool


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_losses_are_those_of_main_py(tiny_args: Any, images: List[Tensor], targets: List[Dict[str, Tensor]],
                                     masks: bool) -> None:
    """Of the same weights, images and objects; no output is left out."""
    args = tiny_args(masks=masks)
    model, criterion, _ = build_model(args)
    options = config_options({"args": vars(args)}, model.state_dict(), 5, masks)
    detectron = Detr(config(MASKS if masks else BOX, *options, "MODEL.DETR.DROPOUT", 0.0))
    detectron.load_state_dict(convert(model.state_dict(), range(5)))
    batch = []
    for image, target in zip(images, targets):
        (height, width), boxes = image.shape[1:], box_cxcywh_to_xyxy(target["boxes"])
        instances = Instances((height, width), gt_classes=target["labels"])
        instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
        slope = (target["labels"][:, None, None] + 1) / 4
        target["masks"] = torch.arange(height)[:, None] < torch.arange(width) * slope
        instances.gt_masks = BitMasks(target["masks"])
        batch.append({"image": image * detectron.pixel_std + detectron.pixel_mean, "instances": instances})
    theirs = detectron(batch)
    ours = criterion(model(images), targets)
    assert set(theirs) == {name for name in ours if name in criterion.weight_dict}
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours[name] * criterion.weight_dict[name], rtol=1e-3, atol=1e-4)


def test_losses_are_weighted_and_results_have_the_wanted_size(tiny_args: Any) -> None:
    """Detectron2 adds up what the model returns: each weighted loss once, and no figure that isn't one."""
    cfg = small_cfg(tiny_args, BOX, "MODEL.DETR.DROPOUT", 0.0)
    model = Detr(cfg)
    boxes = Boxes(torch.tensor([[5.0, 5.0, 30.0, 30.0]]))
    instances = Instances((40, 60), gt_boxes=boxes, gt_classes=torch.tensor([1]))
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    losses = model([{"image": image, "instances": instances}])
    assert set(losses) == {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0"}
    cfg.merge_from_list(["MODEL.DETR.L1_WEIGHT", "10.0", "MODEL.DETR.DEEP_SUPERVISION", "False"])
    other = Detr(cfg)
    other.load_state_dict(model.state_dict())
    plain = other([{"image": image, "instances": instances}])
    assert set(plain) == {"loss_ce", "loss_bbox", "loss_giou"}
    assert plain["loss_bbox"].item() == pytest.approx(2 * losses["loss_bbox"].item(), rel=1e-4)
    model.eval()
    with torch.no_grad():
        found = model([{"image": image, "height": 80, "width": 120}, {"image": image}])
    large, own = (item["instances"] for item in found)
    assert large.image_size == (80, 120) and own.image_size == (40, 60) and len(large) == 12
    torch.testing.assert_close(large.pred_boxes.tensor, 2 * own.pred_boxes.tensor)
    assert torch.equal(large.pred_classes, own.pred_classes) and int(large.pred_classes.max()) < 4
