"""One who does the work that is timed: a checkout, this one or another.

The benchmark uses these classes itself for its own checkout. For others it runs this file in a process of their own,
where `main`, `models` and so on are theirs; it reads commands, JSON lines, and answers them. Hence it imports nothing of
the project at the top. Of a checkout it asks only this:

- models: `main.get_args_parser()`; `models.build_model(args)`, which returns (model, criterion, postprocessors);
  `util.misc.nested_tensor_from_tensor_list(images)`; a model that takes what that returns (UP-DETR's also patches
  [B, M, 3, P, P]); a criterion with a `weight_dict`; `postprocessors["bbox"](outputs, sizes)`;
- samples: `datasets.build_dataset("train", args)`;
- evaluation: `datasets.get_coco_api_from_dataset(dataset)` and `datasets.coco_eval.CocoEvaluator(coco, ["bbox"])` with
  `update`, `synchronize_between_processes`, `accumulate`, `summarize` and `coco_eval["bbox"].stats`.
"""
import abc
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from typing import Any, ContextManager, Dict, Iterable, Iterator, List

import torch
from torch import Tensor, nn

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATED_AT_ONCE = 16  # images
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


class Checkout(abc.ABC):
    """What one turn of work is, in the checkout whose modules can be imported.

    Args:
        spec: `flags` for main.py, of which those that it doesn't know are left out and kept in `ignored`; `data`, what the
            work needs, or a file with it; `seed`.

    Attributes:
        comparable: whether results can be compared with ours: a model whose weights are others has others.
    """

    comparable = True

    def __init__(self, spec: Dict[str, Any]) -> None:
        parser = importlib.import_module("main").get_args_parser()
        self.args, self.ignored = parser.parse_known_args(spec["flags"])
        self.prepare()
        self.device = torch.device(self.args.device)
        torch.manual_seed(spec["seed"])

    def prepare(self) -> None:
        """What is done with the flags before anything is built."""
        if is_this_repository():
            prepare(self.args)

    def check(self) -> Dict[str, Any]:
        """What is compared with the others' results: `loss`, a number, and tensors."""
        return {}

    @abc.abstractmethod
    def run(self, turns: Iterable[Any]) -> None:
        """One unit of work for each of the turns."""


class Model(Checkout):
    """A model with its criterion.

    Args:
        spec: see `Checkout`; `data` as of `workloads.make_batch`; `weights`, a file with a state_dict, or None. They are
            loaded if they fit.
    """

    def __init__(self, spec: Dict[str, Any]) -> None:
        super().__init__(spec)
        self.model, self.criterion, self.postprocessors = importlib.import_module("models").build_model(self.args)
        self.model.to(self.device)
        self.criterion.to(self.device)
        self.comparable = not spec["weights"] or self._takes(torch.load(spec["weights"], weights_only=True))
        if is_this_repository() and importlib.util.find_spec("models.acceleration"):
            importlib.import_module("models.acceleration").compile_parts(self.model, self.args)
        batch = read_data(spec["data"])
        images = importlib.import_module("util.misc").nested_tensor_from_tensor_list(batch["images"])
        self.batch = (images, *([] if batch["patches"] is None else [batch["patches"]]), tuple(batch["targets"]))
        self.amp_dtype = AMP_TYPES.get(getattr(self.args, "amp", None))

    def _takes(self, weights: Dict[str, Tensor]) -> bool:
        """Load weights if they are of this model."""
        mine = {name: value.shape for name, value in self.model.state_dict().items()}
        if mine != {name: value.shape for name, value in weights.items()}:
            return False
        self.model.load_state_dict(weights)
        return True

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def as_in_evaluation(self) -> ContextManager[None]:
        """The fused steps that evaluation takes, where the checkout has them by this name."""
        if not is_this_repository() or not importlib.util.find_spec("models.fused"):
            return contextlib.nullcontext()
        steps = getattr(importlib.import_module("models.fused"), "steps", contextlib.nullcontext)
        return steps()

    def on_device(self) -> Any:
        """The batch's inputs and targets, moved to the device."""
        *inputs, targets = self.batch
        return [item.to(self.device) for item in inputs], moved(list(targets), self.device)

    @torch.no_grad()
    def check(self) -> Dict[str, Any]:
        """Without dropout: the weighted loss of the batch, `pred_logits` and `pred_boxes`."""
        self.model.eval()
        self.criterion.eval()
        inputs, targets = self.on_device()
        with self.as_in_evaluation(), self.autocast():
            outputs = self.model(*inputs)
        loss = weighted_sum(self.criterion(outputs, targets), self.criterion.weight_dict)
        return {"loss": float(loss), **{name: outputs[name].float().cpu() for name in ("pred_logits", "pred_boxes")}}


class Training(Model):
    """A training step: that of the checkout's engine, or one like it where a checkout isn't of this repository."""

    def run(self, turns: Iterable[Any]) -> None:
        if is_this_repository():
            self.train_on(Endless(self.batch, turns))
        else:
            self._train_plainly(turns)

    def train_on(self, loader: Iterable[Any]) -> None:
        """Train with the engine on the batches of a loader."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)
        with contextlib.redirect_stdout(None):
            importlib.import_module("engine").train_one_epoch(
                self.model, self.criterion, loader, self.build_optimizer(), self.device, 0, self.args.clip_max_norm,
                amp_dtype=self.amp_dtype, scaler=scaler)

    def build_optimizer(self) -> torch.optim.Optimizer:
        if is_this_repository():
            return importlib.import_module("main").build_optimizer(self.model, self.args)
        groups: List[List[Tensor]] = [[], []]
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups["backbone" in name].append(parameter)
        return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-5, weight_decay=1e-4)

    def _train_plainly(self, turns: Iterable[Any]) -> None:
        optimizer = self.build_optimizer()
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


class Inference(Model):
    """Images that are on the device -> detections."""

    @torch.no_grad()
    def run(self, turns: Iterable[Any]) -> None:
        self.model.eval()
        inputs, targets = self.on_device()
        sizes = torch.stack([target["orig_size"] for target in targets])
        for _ in turns:
            with self.as_in_evaluation(), self.autocast():
                outputs = self.model(*inputs)
            self.postprocessors["bbox"](outputs, sizes)


class Losses(Checkout):
    """Matching and losses of made-up outputs.

    Args:
        spec: see `Checkout`; `data` holds `outputs` and `targets`.
    """

    def __init__(self, spec: Dict[str, Any]) -> None:
        super().__init__(spec)
        self.criterion = importlib.import_module("models").build_model(self.args)[1].to(self.device).train()
        data = read_data(spec["data"])
        self.outputs, self.targets = moved(data["outputs"], self.device), moved(data["targets"], self.device)

    def check(self) -> Dict[str, Any]:
        return {"loss": float(self.loss().detach())}

    def loss(self) -> Tensor:
        return weighted_sum(self.criterion(self.outputs, self.targets), self.criterion.weight_dict)

    def run(self, turns: Iterable[Any]) -> None:
        for _ in turns:
            self.loss()


class Samples(Checkout):
    """A training sample, one after the other."""

    def __init__(self, spec: Dict[str, Any]) -> None:
        super().__init__(spec)
        with contextlib.redirect_stdout(None):
            self.dataset = importlib.import_module("datasets").build_dataset("train", self.args)

    def run(self, turns: Iterable[Any]) -> None:
        for turn, _ in enumerate(turns):
            if turn % len(self.dataset) == 0 and hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(turn // len(self.dataset))
            self.dataset[turn % len(self.dataset)]


class Evaluation(Checkout):
    """COCO's measures of detections on all validation images.

    Args:
        spec: see `Checkout`; `data` holds the detections by image id.
    """

    def __init__(self, spec: Dict[str, Any]) -> None:
        super().__init__(spec)
        datasets = importlib.import_module("datasets")
        self.evaluator = importlib.import_module("datasets.coco_eval").CocoEvaluator
        with contextlib.redirect_stdout(None):
            self.truth = datasets.get_coco_api_from_dataset(datasets.build_dataset("val", self.args))
        self.detections = read_data(spec["data"])

    def check(self) -> Dict[str, Any]:
        return {"stats": self.evaluate(EVALUATED_AT_ONCE)}

    def run(self, turns: Iterable[Any]) -> None:
        for _ in turns:
            self.evaluate(EVALUATED_AT_ONCE)

    def evaluate(self, at_once: int) -> Tensor:
        """The twelve numbers, of detections that come so many images at once."""
        with contextlib.redirect_stdout(None):
            evaluator = self.evaluator(self.truth, ["bbox"])
            ids = list(self.detections)
            for start in range(0, len(ids), at_once):
                evaluator.update({key: self.detections[key] for key in ids[start:start + at_once]})
            evaluator.synchronize_between_processes()
            evaluator.accumulate()
            evaluator.summarize()
        return torch.tensor([float(number) for number in evaluator.coco_eval["bbox"].stats])


def prepare(args: Any) -> None:
    """What main.py does with its flags before it builds a model; older versions of it do less."""
    importlib.import_module("util.recipes").resolve(args)
    for module, function, given in (("models.acceleration", "set_precision", [args]),
                                    ("util.host_memory", "keep_freed_memory", [])):
        if importlib.util.find_spec(module):
            getattr(importlib.import_module(module), function)(*given)


def is_this_repository() -> bool:
    """Whether `main` and `engine` are this project's, of whatever version."""
    return hasattr(importlib.import_module("main"), "build_optimizer")


def read_data(data: Any) -> Any:
    return torch.load(data, weights_only=True) if isinstance(data, str) else data


def moved(value: Any, device: torch.device) -> Any:
    """Dicts and lists of tensors, with these on the device."""
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return [moved(item, device) for item in value] if isinstance(value, list) else value.to(device)


def weighted_sum(losses: Dict[str, Tensor], weights: Dict[str, float]) -> Tensor:
    return sum(losses[name] * weights[name] for name in losses if name in weights)


CONTENDERS = {"training": Training, "inference": Inference, "losses": Losses, "samples": Samples, "evaluation": Evaluation}


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
            kinds = CONTENDERS
            if spec["kind"] != "checkout":
                kinds = importlib.import_module(spec["kind"]).CONTENDERS
            contender = kinds[spec["work"]](spec)
            found = contender.check() if contender.comparable else {}
            torch.save(found, spec["outputs"])
            self.answer(comparable=contender.comparable, ignored=contender.ignored)
            contender.run(self.turns(contender.device))
        except Exception as error:  # whatever a foreign checkout raises is the benchmark's to tell
            self.answer(error=f"{type(error).__name__}: {error}")
            raise


if __name__ == "__main__":
    Server().run()
