"""One who does the work that is timed: a checkout, or Hugging Face's model.

The benchmark uses these classes itself for its own checkout. For others it runs this file in a process of their own, where
`main`, `models` and so on are theirs; it reads commands, JSON lines, and answers them. Hence it imports nothing of the
project at the top, and asks of a checkout only this: `main.get_args_parser()`; `models.build_model(args)`, which returns
(model, criterion, postprocessors); `util.misc.nested_tensor_from_tensor_list(images)`; a model that takes what that
returns (UP-DETR's also patches [B, M, 3, P, P]); a criterion with a `weight_dict`; `postprocessors["bbox"]`.
"""
import contextlib
import importlib
import json
import os
import re
import sys
import time
from typing import Any, Dict, Iterable, Iterator, List

import torch
from torch import Tensor, nn

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TRAINED_STAGES = re.compile(r"\.stages\.[123]\.")  # of Hugging Face's ResNet: torchvision's layer2 … layer4
ENDLESS = 10 ** 6  # steps of the training that is timed; it is left when enough are


class Endless:
    """A loader that returns one batch in each of the turns."""

    def __init__(self, batch: Any, turns: Iterable[Any]) -> None:
        self.batch, self.turns = batch, turns

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[Any]:
        for _ in self.turns:
            yield self.batch


class Checkout:
    """The models of the checkout whose modules can be imported.

    Args:
        spec: `flags` for main.py, of which those that it doesn't know are left out and kept in `ignored`; `batch`, a file
            or dict, see `workloads.make_batch`; `seed`; `weights`, a file with a state_dict, or None.
    """

    def __init__(self, spec: Dict[str, Any]) -> None:
        parser = importlib.import_module("main").get_args_parser()
        self.args, self.ignored = parser.parse_known_args(spec["flags"])
        self.device = torch.device(self.args.device)
        torch.manual_seed(spec["seed"])
        self.model, self.criterion, self.postprocessors = importlib.import_module("models").build_model(self.args)
        self.model.to(self.device)
        self.criterion.to(self.device)
        if spec["weights"]:
            self.model.load_state_dict(torch.load(spec["weights"], map_location=self.device, weights_only=True))
        batch = read_batch(spec["batch"])
        images = importlib.import_module("util.misc").nested_tensor_from_tensor_list(batch["images"])
        self.batch = (images, *([] if batch["patches"] is None else [batch["patches"]]), tuple(batch["targets"]))
        self.amp_dtype = AMP_TYPES.get(getattr(self.args, "amp", None))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def on_device(self) -> Any:
        """The batch's inputs and targets, moved to the device."""
        *inputs, targets = self.batch
        return ([item.to(self.device) for item in inputs],
                [{name: value.to(self.device) for name, value in target.items()} for target in targets])

    @torch.no_grad()
    def check(self) -> Dict[str, Any]:
        """Without dropout: the weighted loss of the batch, `pred_logits` and `pred_boxes`."""
        self.model.eval()
        self.criterion.eval()
        inputs, targets = self.on_device()
        with self.autocast():
            outputs = self.model(*inputs)
        loss = weighted_sum(self.criterion(outputs, targets), self.criterion.weight_dict)
        return {"loss": float(loss), **{name: outputs[name].float().cpu() for name in ("pred_logits", "pred_boxes")}}

    def train(self, turns: Iterable[Any]) -> None:
        """A training step in each turn: our engine's, or one like it where a checkout isn't of this repository."""
        optimizer = self.build_optimizer()
        if not is_this_repository():
            self._train_plainly(turns, optimizer)
            return
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        with contextlib.redirect_stdout(None):
            importlib.import_module("engine").train_one_epoch(
                self.model, self.criterion, Endless(self.batch, turns), optimizer, self.device, 0,
                self.args.clip_max_norm, amp_dtype=self.amp_dtype, scaler=scaler)

    def build_optimizer(self) -> torch.optim.Optimizer:
        if is_this_repository():
            return importlib.import_module("main").build_optimizer(self.model, self.args)
        groups: List[List[Tensor]] = [[], []]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["backbone" in name].append(parameter)
        return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-5, weight_decay=1e-4)

    def _train_plainly(self, turns: Iterable[Any], optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        self.criterion.train()
        for _ in turns:
            inputs, targets = self.on_device()
            with self.autocast():
                outputs = self.model(*inputs)
            loss = weighted_sum(self.criterion(outputs, targets), self.criterion.weight_dict)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            optimizer.step()

    @torch.no_grad()
    def inference(self, turns: Iterable[Any]) -> None:
        """Images that are on the device -> detections, in each turn."""
        self.model.eval()
        inputs, targets = self.on_device()
        sizes = torch.stack([target["orig_size"] for target in targets])
        for _ in turns:
            with self.autocast():
                outputs = self.model(*inputs)
            self.postprocessors["bbox"](outputs, sizes)


class HuggingFace:
    """transformers' DETR or Deformable DETR with random weights, of the size that our flags say.

    Args:
        spec: `options`, our resolved flags; `batch` and `seed` as for `Checkout`.
    """

    def __init__(self, spec: Dict[str, Any]) -> None:
        from transformers.utils import logging
        logging.set_verbosity_error()
        options = spec["options"]
        torch.manual_seed(spec["seed"])
        self.device = torch.device(options["device"])
        self.model = _hugging_face_model(options).to(self.device)
        for name, parameter in self.model.named_parameters():  # its own freezing takes all of this backbone
            if "backbone" in name:
                parameter.requires_grad_(bool(TRAINED_STAGES.search(name)) and options["lr_backbone"] > 0)
        self.amp_dtype = AMP_TYPES.get(options["amp"])
        self.learning_rate = options["lr"]
        self.deformable = options["model"] == "deformable_detr"
        self.ignored: List[str] = []
        batch = read_batch(spec["batch"])
        self.images = torch.stack(batch["images"])
        self.labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in batch["targets"]]

    def check(self) -> Dict[str, Any]:
        """Nothing to compare: the weights are others."""
        return {}

    def train(self, turns: Iterable[Any]) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=1e-4)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.model.train()
        for _ in turns:
            images, mask, labels = self._on_device()
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                loss = self.model(pixel_values=images, pixel_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 0.1)
            scaler.step(optimizer)
            scaler.update()

    @torch.no_grad()
    def inference(self, turns: Iterable[Any]) -> None:
        from transformers import DeformableDetrImageProcessor, DetrImageProcessor
        processor = DeformableDetrImageProcessor() if self.deformable else DetrImageProcessor()
        self.model.eval()
        images, mask, _ = self._on_device()
        sizes = torch.tensor([list(image.shape[1:]) for image in images], device=self.device)
        for _ in turns:
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                outputs = self.model(pixel_values=images, pixel_mask=mask)
            processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)

    def _on_device(self) -> Any:
        images = self.images.to(self.device)
        mask = torch.ones(images[:, 0].shape, dtype=torch.int64, device=self.device)
        return images, mask, [{name: value.to(self.device) for name, value in label.items()} for label in self.labels]


RESNETS = {"resnet18": ("basic", [2, 2, 2, 2]), "resnet34": ("basic", [3, 4, 6, 3]),
           "resnet50": ("bottleneck", [3, 4, 6, 3]), "resnet101": ("bottleneck", [3, 4, 23, 3])}


def _hugging_face_model(options: Dict[str, Any]) -> nn.Module:
    from transformers import (DeformableDetrConfig, DeformableDetrForObjectDetection, DetrConfig, DetrForObjectDetection,
                              ResNetConfig)
    layer_type, depths = RESNETS[options["backbone"]]
    deformable = options["model"] == "deformable_detr"
    widths = [64, 128, 256, 512] if layer_type == "basic" else [256, 512, 1024, 2048]
    backbone = ResNetConfig(layer_type=layer_type, depths=depths, hidden_sizes=widths,
                            out_features=["stage2", "stage3", "stage4"] if deformable else ["stage4"])
    common = dict(backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                  num_queries=options["num_queries"], d_model=options["hidden_dim"], dropout=options["dropout"],
                  encoder_layers=options["enc_layers"], decoder_layers=options["dec_layers"],
                  encoder_ffn_dim=options["dim_feedforward"], decoder_ffn_dim=options["dim_feedforward"],
                  encoder_attention_heads=options["nheads"], decoder_attention_heads=options["nheads"],
                  num_labels=options["num_classes"] or 91, auxiliary_loss=options["aux_loss"])
    if not deformable:
        return DetrForObjectDetection(DetrConfig(**common))
    return DeformableDetrForObjectDetection(DeformableDetrConfig(
        **common, num_feature_levels=options["num_feature_levels"], encoder_n_points=options["enc_n_points"],
        decoder_n_points=options["dec_n_points"], with_box_refine=options["with_box_refine"],
        two_stage=options["two_stage"]))


def is_this_repository() -> bool:
    """Whether `main` and `engine` are this project's, of whatever version."""
    return hasattr(importlib.import_module("main"), "build_optimizer")


def read_batch(batch: Any) -> Dict[str, Any]:
    return batch if isinstance(batch, dict) else torch.load(batch, weights_only=True)


def weighted_sum(losses: Dict[str, Tensor], weights: Dict[str, float]) -> Tensor:
    return sum(losses[name] * weights[name] for name in losses if name in weights)


class Server:
    """Reads a spec, then commands, from stdin; answers on what was stdout before everything printed went to stderr."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        self.answers.write(json.dumps(values) + "\n")
        self.answers.flush()

    def turns(self, device: torch.device) -> Iterator[None]:
        """A turn for each line that comes in, answered by the seconds it took."""
        for _ in sys.stdin:
            start = time.perf_counter()
            yield
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.answer(seconds=time.perf_counter() - start)

    def run(self) -> None:
        spec = json.loads(sys.stdin.readline())
        sys.path[0] = spec["root"]
        torch.set_num_threads(spec["threads"])
        try:
            contender = (Checkout if spec["kind"] == "checkout" else HuggingFace)(spec)
            found = contender.check()
            if found:
                torch.save({name: value for name, value in found.items() if name != "loss"}, spec["outputs"])
            self.answer(ready=True, loss=found.get("loss"), ignored=contender.ignored)
            getattr(contender, spec["work"])(self.turns(contender.device))
        except Exception as error:  # whatever a foreign checkout raises is the benchmark's to tell
            self.answer(error=f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    Server().run()
