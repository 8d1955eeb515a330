"""The loops: one epoch of training, evaluation of detections, and evaluation of a pre-training."""
import contextlib
import math
import os
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from datasets.coco_eval import CocoEvaluator
from datasets.panoptic_eval import PanopticEvaluator
from models import fused
from models.matcher import NonFinitePredictionError
from util.box_ops import aligned_iou, box_cxcywh_to_xyxy
from util.checkpoint import save_checkpoint
from util.metric_logger import num_batches
from util.misc import MetricLogger, NestedTensor, SmoothedValue, is_main_process, print_main
from util.watch import StepWatch

PRINT_FREQ = 10
PATCH_LABEL = 1
STATS_OF = {"bbox": "coco_eval_bbox", "segm": "coco_eval_masks"}  # by IoU type, the name of COCO's twelve numbers


def to_device(batch: Sequence[Any], device: torch.device) -> Tuple[List[Any], List[Dict[str, Tensor]]]:
    """Move a collated batch (inputs…, targets) to the device; what isn't a tensor, such as a file's name, stays."""
    *inputs, targets = batch
    return [_moved(item, device) for item in inputs], [
        {name: _moved(value, device) for name, value in target.items()} for target in targets]


def _moved(item: Any, device: torch.device) -> Any:
    if isinstance(item, (Tensor, NestedTensor)):
        return item.to(device, non_blocking=True)
    return [_moved(part, device) for part in item] if isinstance(item, list) else item


def as_tensors(losses: Dict[str, Any], device: torch.device) -> Dict[str, Tensor]:
    """Make scalar tensors of the terms that a criterion returns as plain numbers."""
    def as_tensor(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            return value.reshape(()) if value.dim() else value
        return torch.tensor(float(value)).to(device, non_blocking=True)
    return {name: as_tensor(value) for name, value in losses.items()}


def weighted_sum(losses: Dict[str, Tensor], weights: Dict[str, float]) -> Tensor:
    """The total loss: every loss that has a weight, times it."""
    names = [name for name in losses if name in weights]
    values = torch.stack([losses[name] for name in names])
    return (values * torch.tensor([weights[name] for name in names]).to(values.device, non_blocking=True)).sum()


@fused.steps()
def train_one_epoch(model: nn.Module, criterion: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer,
                    device: torch.device, epoch: int, max_norm: Optional[float] = 0, *, accumulate_steps: int = 1,
                    amp_dtype: Optional[torch.dtype] = None,
                    scaler: Optional["torch.amp.GradScaler"] = None,
                    on_line: Optional[Callable[[int, MetricLogger], None]] = None,
                    first_step: int = 0, meters: Optional[Dict[str, Any]] = None, watch: Optional[StepWatch] = None,
                    on_step: Optional[Callable[[int, MetricLogger], None]] = None) -> Dict[str, float]:
    """Train over the loader once.

    Args:
        data_loader: batches (inputs…, targets), as often as wanted; if it has no length, `accumulate_steps` must be 1.
        max_norm: the gradient norm over all parameters is clipped to it where it is above 0.
        accumulate_steps: batches whose averaged gradients make one optimizer step.
        amp_dtype: run the model under autocast in this type; matching and losses stay in float32.
        scaler: loss scaler for float16.
        on_line: called with the step and the logger in each step that prints a line; must not wait for other processes.
        first_step: steps of the epoch that were taken before; the loader begins after them.
        meters: state of the logger after these.
        watch: finds numbers that aren't finite, and hears what the processes are asked for.
        on_step: called after each optimizer step with the number of steps of the epoch that are taken, and the logger.

    Returns:
        averages over the epoch and all processes, by name.

    Raises:
        FloatingPointError: if the loss, the gradient (but for float16, where such a step is passed over and counted in
            the meter `overflow`) or a prediction at matching isn't finite. It is found a step later.

    The device is waited for once a step, at the matching (`models.matcher`), and besides only when a line is printed.
    """
    device = torch.device(device)
    model.train()
    criterion.train()
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    logger.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    logger.load_state_dict(meters or {})
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    watch = watch or StepWatch(device)
    count = num_batches(data_loader)
    length = first_step + (math.inf if count is None else count)
    if count is None and accumulate_steps > 1:
        raise ValueError("accumulate_steps needs a data_loader with a length, which tells the last batch")
    optimizer.zero_grad(set_to_none=True)
    for step, batch in enumerate(logger.log_every(data_loader, PRINT_FREQ, f"Epoch: [{epoch}]", first_step), first_step):
        watch.begin(epoch, step, batch[-1])
        inputs, targets = to_device(batch, device)
        group_start = step - (step - first_step) % accumulate_steps
        group_size = min(accumulate_steps, length - group_start)
        last_of_group = step == group_start + group_size - 1
        postpone = isinstance(model, nn.parallel.DistributedDataParallel) and not last_of_group
        with model.no_sync() if postpone else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                outputs = model(*inputs)
            with watch.matching():
                # Waits for the device: the matching is solved on the host.
                losses = as_tensors(criterion(outputs, targets), device)
            loss = weighted_sum(losses, criterion.weight_dict)
            scaler.scale(loss / group_size).backward()
        gradient_norm = _optimizer_step(model, optimizer, scaler, max_norm) if last_of_group else None
        reduced = watch.reduce(losses, loss.detach(), gradient_norm, may_overflow=scaler.is_enabled())
        if "overflow" in reduced:
            logger.update(overflow=reduced.pop("overflow"))
        _log(logger, reduced, criterion.weight_dict)
        logger.update(lr=optimizer.param_groups[0]["lr"])
        if gradient_norm is not None:  # a step that float16 overflowed in, which is passed over, counts as 0
            logger.update(grad_norm=gradient_norm.detach().float().nan_to_num(0.0, 0.0, 0.0))
        if on_line and (step % PRINT_FREQ == 0 or step == length - 1):
            on_line(step, logger)  # waits for the device: figures are read
        if on_step and last_of_group:
            on_step(step + 1, logger)
    watch.end()
    logger.synchronize_between_processes()
    print_main("Averaged stats:", logger)
    return logger.averages()


def _optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler",
                    max_norm: Optional[float]) -> Tensor:
    """Clip the gradients, take a step and forget them; returns their norm before."""
    scaler.unscale_(optimizer)
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm if max_norm and max_norm > 0 else math.inf)
    scaler.step(optimizer)  # whether float16 overflowed is asked for on the host if the optimizer isn't fused
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return gradient_norm


def _log(logger: MetricLogger, losses: Dict[str, Tensor], weights: Dict[str, float]) -> None:
    """Record losses, and their total `loss`: weighted under their names, as they are with `_unscaled`."""
    logger.update(**{name: losses[name] for name in ("loss", "class_error") if name in losses})
    for name, value in losses.items():
        if name in weights:
            logger.meters[name].update(value, weight=weights[name])
    logger.update(**{f"{name}_unscaled": value for name, value in losses.items() if name != "loss"})


@torch.no_grad()
@fused.steps()
def evaluate(model: nn.Module, criterion: nn.Module, postprocessors: Dict[str, nn.Module], data_loader: Iterable,
             base_ds: Any, device: torch.device, output_dir: Optional[str] = None, *,
             amp_dtype: Optional[torch.dtype] = None) -> Tuple[Dict[str, Any], CocoEvaluator]:
    """Evaluate detections by COCO's measures, and panoptic maps by panoptic quality.

    Args:
        model: the model itself, not its DistributedDataParallel wrapper: processes may have unequal shares of the images.
        postprocessors: "bbox"; "segm" adds masks, "panoptic" adds maps, whose ground truth the loader's data set names.
        base_ds: the COCO ground truth of the data set (`datasets.get_coco_api_from_dataset`).
        output_dir: if given, COCO's precision and recall tables of the boxes go to `eval/latest.pth` in it, and
            panoptic maps to `panoptic_eval/`.

    Returns:
        averages over the images by name, and the evaluator of boxes and masks. The averages hold the twelve COCO numbers
        of boxes as `coco_eval_bbox` and those of masks as `coco_eval_masks`, and by the name of each class its [AP, AP50]
        as `coco_eval_bbox_per_class` and so on; for VOC's images also `voc_ap50_11_points` and `voc_ap50_all_points`; for
        all classes, things and stuff `PQ_all`,
        `PQ_th` and `PQ_st`, dicts of `pq`, `sq`, `rq` in 0..1 and the number `n` of classes.
    """
    device = torch.device(device)
    model.eval()
    criterion.eval()
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("class_error", SmoothedValue(window_size=1, fmt="{value:.2f}"))
    evaluator = CocoEvaluator(base_ds, [iou_type for iou_type in STATS_OF if iou_type in postprocessors])
    panoptic = panoptic_evaluator(data_loader.dataset, output_dir) if "panoptic" in postprocessors else None
    for batch in logger.log_every(data_loader, PRINT_FREQ, "Test:"):
        inputs, targets = to_device(batch, device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            outputs = model(*inputs)
        padded = _padded_size(inputs[0])
        for index, target in enumerate(targets):  # one by one: averages then don't depend on the batches
            target = _padded_masks(target, *padded)
            losses = as_tensors(criterion(_of_image(outputs, index), [target]), device)
            _log(logger, {**losses, "loss": weighted_sum(losses, criterion.weight_dict)}, criterion.weight_dict)
        original_sizes = torch.stack([torch.as_tensor(target["orig_size"], device=device) for target in targets])
        detections = postprocessors["bbox"](outputs, original_sizes)
        sizes = torch.stack([torch.as_tensor(target["size"], device=device) for target in targets])
        if "segm" in postprocessors:
            detections = postprocessors["segm"](detections, outputs, original_sizes, sizes)
        image_ids = [int(target["image_id"]) for target in targets]
        _check_finite(image_ids, detections)
        evaluator.update(dict(zip(image_ids, detections)))
        if panoptic:
            maps = postprocessors["panoptic"](outputs, sizes, original_sizes)
            panoptic.update([{"image_id": image_id, "file_name": f"{image_id:012d}.png", **found}
                             for image_id, found in zip(image_ids, maps)])
    logger.synchronize_between_processes()
    print_main("Averaged stats:", logger)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    stats: Dict[str, Any] = logger.averages()
    for iou_type, evaluation in evaluator.coco_eval.items():
        stats[STATS_OF[iou_type]] = [float(number) for number in evaluation.stats]
        stats[f"{STATS_OF[iou_type]}_per_class"] = {name: list(figures) for name, figures in evaluator.per_class(iou_type).items()}
    stats.update({f"voc_ap50_{points}": ap50 for points, ap50 in evaluator.voc_ap50().items()})
    if panoptic:
        panoptic.synchronize_between_processes()
        results = panoptic.summarize()
        stats.update(PQ_all=results["All"], PQ_th=results["Things"], PQ_st=results["Stuff"])
    if output_dir and is_main_process():
        tables = evaluator.coco_eval["bbox"].eval
        save_checkpoint({name: torch.from_numpy(tables[name]) for name in ("precision", "recall", "scores")},
                        os.path.join(output_dir, "eval", "latest.pth"))
    return stats, evaluator


def _check_finite(image_ids: Sequence[int], detections: Sequence[Dict[str, Tensor]]) -> None:
    """Raise NonFinitePredictionError for detections that aren't finite; without objects no matching would notice."""
    finite = torch.stack([found["scores"].isfinite().all() & found["boxes"].isfinite().all() for found in detections])
    bad = [str(image_id) for image_id, is_finite in zip(image_ids, finite.tolist()) if not is_finite]  # one wait for all
    if bad:
        raise NonFinitePredictionError("the model predicts NaN or infinite classes or boxes for image id " + ", ".join(bad))


def _padded_masks(target: Dict[str, Tensor], height: int, width: int) -> Dict[str, Tensor]:
    """A target whose masks, if it has any, are as large as the batch, in which masks are predicted; padding is background."""
    if "masks" not in target:
        return target
    masks = target["masks"]
    return {**target, "masks": nn.functional.pad(masks, (0, width - masks.shape[2], 0, height - masks.shape[1]))}


def _padded_size(samples: Any) -> Tuple[int, int]:
    """Height and width of a batch: a NestedTensor, one tensor or a list of tensors."""
    images = samples if isinstance(samples, list) else [getattr(samples, "tensors", samples)]
    return max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)


def _of_image(outputs: Any, index: int) -> Any:
    """Of a model's outputs those for one image of the batch."""
    if isinstance(outputs, dict):
        return {name: _of_image(value, index) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return [_of_image(value, index) for value in outputs]
    return outputs[index:index + 1]


def panoptic_evaluator(dataset: Dataset, output_dir: Optional[str]) -> PanopticEvaluator:
    """The evaluator of a panoptic data set, also inside a `Subset`; writes to `panoptic_eval/` in a folder if given."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return PanopticEvaluator(dataset.coco_panoptic_json, dataset.coco_panoptic_folder,
                             os.path.join(output_dir, "panoptic_eval") if output_dir else None)


@torch.no_grad()
@fused.steps()
def evaluate_patches(model: nn.Module, data_loader: Iterable, device: torch.device) -> Dict[str, float]:
    """Measure whether a pre-trained UP-DETR finds the patch that it is shown.

    For each patch the box of its most confident query is compared with the place the patch came from; then the same is done
    while showing patches of another image (`control_patches` of the targets). A model that ignores its patch scores the
    same on both.

    Returns:
        `patch_iou`, `control_iou` in 0..1 (means over all patches) and `patch_iou50`, `control_iou50`, the shares of
        patches whose IoU is above 0.5.
    """
    device = torch.device(device)
    model.eval()
    logger = MetricLogger(delimiter="  ")
    for batch in logger.log_every(data_loader, PRINT_FREQ, "Test:"):
        (samples, patches), targets = to_device(batch, device)
        control = torch.stack([target["control_patches"] for target in targets])
        expected = torch.stack([target["boxes"] for target in targets])
        for name, shown in (("patch", patches), ("control", control)):
            outputs = model(samples, shown)
            iou = aligned_iou(box_cxcywh_to_xyxy(most_confident_boxes(outputs, shown.shape[1])[0]),
                              box_cxcywh_to_xyxy(expected))[0]
            logger.meters[f"{name}_iou"].update(iou.mean(), n=iou.numel())
            logger.meters[f"{name}_iou50"].update((iou > 0.5).float().mean(), n=iou.numel())
    logger.synchronize_between_processes()
    stats = logger.averages()
    print_main("Patches found: mean IoU {patch_iou:.3f}, above 0.5 {patch_iou50:.3f}; control with patches of another image: "
               "mean IoU {control_iou:.3f}, above 0.5 {control_iou50:.3f}".format(**stats))
    return stats


def most_confident_boxes(outputs: Dict[str, Tensor], num_patches: int) -> Tuple[Tensor, Tensor]:
    """Of each patch's group of queries the box that is most surely the patch.

    Args:
        outputs: of UPDETR, for k = num_patches patches.

    Returns:
        cxcywh boxes [B, k, 4] and confidences [B, k] in 0..1.
    """
    confidence = outputs["pred_logits"].float().softmax(-1)[..., PATCH_LABEL].unflatten(1, (num_patches, -1))
    boxes = outputs["pred_boxes"].unflatten(1, (num_patches, -1))
    best, query = confidence.max(-1)
    return boxes.gather(2, query[..., None, None].expand(-1, -1, 1, 4))[:, :, 0], best
