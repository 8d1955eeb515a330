"""transformers' DETR and Deformable DETR as contenders, with random weights: nothing is downloaded."""
import re
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor, nn
from transformers import (DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessor, DetrConfig,
                          DetrForObjectDetection, DetrImageProcessor, ResNetConfig)
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.utils import logging

from tools.benchmark.contender import AMP_TYPES, moved, read_data
from util.errors import InputError

TRAINED_STAGES = re.compile(r"\.stages\.[123]\.")  # of Hugging Face's ResNet: torchvision's layer2 … layer4
RESNETS = {"resnet18": ("basic", [2, 2, 2, 2]), "resnet34": ("basic", [3, 4, 6, 3]),
           "resnet50": ("bottleneck", [3, 4, 6, 3]), "resnet101": ("bottleneck", [3, 4, 23, 3]),
           "resnet152": ("bottleneck", [3, 8, 36, 3])}


class HuggingFace:
    """transformers' DETR or Deformable DETR with random weights, of the size that our flags say.

    Args:
        spec: `options`, our resolved flags; `data` and `seed` as for `contender.Model`.
    """

    comparable = False  # its weights are others

    def __init__(self, spec: Dict[str, Any]) -> None:
        logging.set_verbosity_error()
        options = spec["options"]
        torch.manual_seed(spec["seed"])
        self.device = torch.device(options["device"])
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.get("tf32", False)
        self.model = build_model(options).to(self.device)
        for name, parameter in self.model.named_parameters():  # its own freezing takes all of this backbone
            if "backbone" in name:
                parameter.requires_grad_(bool(TRAINED_STAGES.search(name)) and options["lr_backbone"] > 0)
        self.amp_dtype = AMP_TYPES.get(options["amp"])
        self.learning_rate = options["lr"]
        self.deformable = options["model"] == "deformable_detr"
        self.ignored: List[str] = []
        batch = read_data(spec["data"])
        self.images, self.patches = torch.stack(batch["images"]), batch["patches"]
        self.labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in batch["targets"]]

    def _on_device(self) -> Any:
        images = self.images.to(self.device)
        mask = torch.ones(images[:, 0].shape, dtype=torch.int64, device=self.device)
        return images, mask, moved(self.labels, self.device)


class HuggingFaceTraining(HuggingFace):
    """A training step like ours, without the logging.

    transformers has no UP-DETR. For its pre-training, DETR's decoder starts from queries made of the patches' pooled features:
    the same work on images, patches and boxes, without the reconstruction of features.
    """

    def __init__(self, spec: Dict[str, Any]) -> None:
        super().__init__(spec)
        if self.patches is not None:
            options = spec["options"]
            self.queries_per_patch = options["num_queries"] // self.patches.shape[1]
            self.model.patch2query = nn.Linear(self.model.config.backbone_config.hidden_sizes[-1], options["hidden_dim"])
            self.model.to(self.device)

    def _queries(self) -> Optional[Tensor]:
        """UP-DETR's patches as queries [B, N, d]; None for detectors, whose queries are learned ones alone."""
        if self.patches is None:
            return None
        patches = self.patches.to(self.device)
        features = self.model.model.backbone.model(patches.flatten(0, 1)).feature_maps[-1].mean((2, 3))
        return self.model.patch2query(features.unflatten(0, patches.shape[:2])).repeat_interleave(self.queries_per_patch, 1)

    def run(self, turns: Iterable[Any]) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=1e-4)
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        self.model.train()
        for _ in turns:
            images, mask, labels = self._on_device()
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                loss = self.model(pixel_values=images, pixel_mask=mask, labels=labels,
                                  decoder_inputs_embeds=self._queries()).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 0.1)
            scaler.step(optimizer)
            scaler.update()


class HuggingFaceInference(HuggingFace):
    """Images that are on the device -> detections."""

    @torch.no_grad()
    def run(self, turns: Iterable[Any]) -> None:
        processor = DeformableDetrImageProcessor() if self.deformable else DetrImageProcessor()
        self.model.eval()
        images, mask, _ = self._on_device()
        sizes = torch.tensor([list(image.shape[1:]) for image in images], device=self.device)
        for _ in turns:
            with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                outputs = self.model(pixel_values=images, pixel_mask=mask)
            processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)


class HuggingFaceLosses:
    """transformers' matching and losses of DETR for the same outputs as `contender.Losses`."""

    comparable = True

    def __init__(self, spec: Dict[str, Any]) -> None:
        options = spec["options"]
        self.device = torch.device(options["device"])
        self.ignored: List[str] = []
        data = moved(read_data(spec["data"]), self.device)
        layers = [*data["outputs"]["aux_outputs"], data["outputs"]]
        self.logits = torch.stack([layer["pred_logits"] for layer in layers])
        self.boxes = torch.stack([layer["pred_boxes"] for layer in layers])
        self.config = DetrConfig(num_labels=self.logits.shape[-1] - 1, decoder_layers=len(layers), auxiliary_loss=True)
        self.labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in data["targets"]]

    def check(self) -> Dict[str, Any]:
        return {"loss": float(self.loss().detach())}

    def loss(self) -> Tensor:
        return ForObjectDetectionLoss(self.logits[-1], self.labels, self.device, self.boxes[-1], self.config,
                                      self.logits, self.boxes)[0]

    def run(self, turns: Iterable[Any]) -> None:
        for _ in turns:
            self.loss()


def build_model(options: Dict[str, Any]) -> nn.Module:
    """Their model for our flags."""
    if options["backbone"] not in RESNETS:
        raise InputError(f"--against hf: Hugging Face has no --backbone {options['backbone']!r}")
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


CONTENDERS = {"training": HuggingFaceTraining, "inference": HuggingFaceInference, "losses": HuggingFaceLosses}
