"""Train and evaluate DETR with Detectron2: python d2/train_net.py --config-file FILE [--eval-only] [NAME VALUE …]."""
import functools
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project, instead of this folder

from d2 import require_detectron2
from util.errors import InputError, run_program

if __name__ == "__main__":
    run_program(require_detectron2)

import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm

from d2.detr import DetrDatasetMapper, add_detr_config
from d2.detr.solver import build_optimizer
from datasets.checks import image_entry_problems, raise_first
from datasets.coco import class_names, read_ground_truth

CONFIG = Path(__file__).resolve().parent / "configs" / "detr_256_6_6_torchvision.yaml"
OWN_SETS = {"train": "own_train", "val": "own_val"}  # names under which --coco-path's are registered


class Trainer(DefaultTrainer):
    """Detectron2's trainer with DETR's data, optimizer and COCO's measures."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=DetrDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=DetrDatasetMapper(cfg, is_train=False))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: Any) -> Any:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))


class StrictCheckpointer(DetectionCheckpointer):
    """Refuses weights that don't fill the model exactly, where Detectron2 would warn and evaluate random ones."""

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        result = super()._load_model(checkpoint)
        differing = [*result.missing_keys, *result.unexpected_keys, *[item[0] for item in result.incorrect_shapes]]
        if differing:
            raise InputError(f"MODEL.WEIGHTS doesn't fit the model that the config describes: {len(differing)} tensors "
                             f"differ, first {differing[0]} (d2/converter.py prints the options a checkpoint needs)")
        return result


def register_own_sets(root: str) -> int:
    """Make the COCO-format data set in a folder, laid out as for `main.py`, known to Detectron2 as own_train, own_val.

    Returns:
        the number of its classes.
    """
    folder, names = Path(root), {}
    for image_set, name in OWN_SETS.items():
        annotations = folder / "annotations" / f"instances_{image_set}2017.json"
        if image_set == "val" or annotations.is_file():  # an evaluation does without the training images
            content = read_ground_truth(annotations)
            raise_first(image_entry_problems(content["images"], annotations)[1])
            names[image_set] = class_names(content)
            register_coco_instances(name, {"thing_classes": list(names[image_set].values())}, str(annotations),
                                    str(folder / f"{image_set}2017"))
    if names.get("train", names["val"]) != names["val"]:
        raise InputError(f"--coco-path {root}: training and validation annotations list different categories")
    return len(names["val"])


def merge(method: Callable[[Any], None], source: Any) -> None:
    """Merge a file or options into a config; an unknown name or a value of the wrong type becomes InputError."""
    try:
        method(source)
    except (AssertionError, KeyError, OSError, ValueError, yaml.YAMLError) as error:
        where = f"--config-file {source}" if isinstance(source, str) else "an option on the command line"
        raise InputError(f"{where}: {error.args[0] if isinstance(error, KeyError) else error}") from error


def setup(args: Any) -> CfgNode:
    """The frozen config that the command line describes; also makes the output folder and the loggers.

    Raises:
        InputError: if options contradict each other or the data set.
    """
    cfg = get_cfg()
    add_detr_config(cfg)
    # By default a config may construct any Python object.
    merge(functools.partial(cfg.merge_from_file, allow_unsafe=False), args.config_file)
    if args.coco_path:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (OWN_SETS["train"],), (OWN_SETS["val"],)
        cfg.MODEL.DETR.NUM_CLASSES = register_own_sets(args.coco_path)
    merge(cfg.merge_from_list, args.opts)
    for name in cfg.DATASETS.TEST if args.eval_only else cfg.DATASETS.TRAIN:
        require_classes(name, cfg.MODEL.DETR.NUM_CLASSES)
    if cfg.MODEL.DETR.FROZEN_WEIGHTS and not args.eval_only and cfg.MODEL.WEIGHTS:
        raise InputError(f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} would overwrite MODEL.DETR.FROZEN_WEIGHTS; set it to ''")
    if cfg.MODEL.DETR.FROZEN_WEIGHTS and not cfg.MODEL.MASK_ON:
        raise InputError("MODEL.DETR.FROZEN_WEIGHTS has no effect without MODEL.MASK_ON")
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def require_classes(dataset_name: str, num_classes: int) -> None:
    """Raise InputError unless the data set is registered and has as many classes as MODEL.DETR.NUM_CLASSES."""
    if dataset_name not in DatasetCatalog:
        raise InputError(f"DATASETS: {dataset_name} is not registered (--coco-path DIR registers a folder)")
    classes = MetadataCatalog.get(dataset_name).get("thing_classes")  # some sets tell only once they are read
    if classes is not None and len(classes) != num_classes:
        raise InputError(f"MODEL.DETR.NUM_CLASSES {num_classes} isn't the {len(classes)} of data set {dataset_name}")


def main(args: Any) -> Any:
    """Evaluate or train, in each process; returns the measures, if there was an evaluation."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    StrictCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def get_args_parser() -> Any:
    """Detectron2's flags and one of ours."""
    parser = default_argument_parser()
    parser.set_defaults(config_file=str(CONFIG))
    parser.add_argument("--coco-path", "--coco_path", metavar="DIR", help="train and evaluate on this folder's "
                        "annotations/, train2017/ and val2017/ instead of the config's DATASETS; sets "
                        "MODEL.DETR.NUM_CLASSES")
    return parser


def start() -> None:
    """Run `main` in as many processes as the flags say."""
    args = get_args_parser().parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))


if __name__ == "__main__":
    run_program(start)
