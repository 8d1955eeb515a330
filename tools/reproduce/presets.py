"""How large a reproduction is: its world, its model and how long everything trains."""
import dataclasses
from dataclasses import dataclass
from typing import Any, Dict, Tuple

from util.errors import InputError
from util.files import read_json, shown


@dataclass(frozen=True)
class Preset:
    """Everything that decides the results of a reproduction, besides its seeds. Strings are flags, as on a command line.

    Attributes:
        world: of `datasets.toy`; its unlabelled images are pre-trained on, half of its validation images report.
        backbone: of `tools.pretrain_toy_backbone`; the network that every training starts from.
        model: of main.py, for all models.
        detr, deformable: for models of each kind.
        updetr, detreg: for pre-trainings of each kind; what rows differ in is in `tools.reproduce.rows`.
        finetune: for trainings on labels, alike for all rows.
        num_patches: M of UP-DETR's rows with several patches.
        pretrain_epochs, detreg_epochs: of each pre-training.
        schedules: epochs of fine-tunings on all labels, by name; the shortest is the first.
        labels: percentages of the labels; with fewer than all, the short schedule makes as many steps in more epochs.
        evaluations: points of a learning curve.
    """

    world: str
    backbone: str
    model: str
    detr: str
    deformable: str
    updetr: str
    detreg: str
    finetune: str
    num_patches: int
    pretrain_epochs: int
    detreg_epochs: int
    schedules: Dict[str, int]
    labels: Tuple[int, ...] = (100, 10, 5)
    evaluations: int = 6

    @property
    def shortest(self) -> str:
        """Name of the shortest schedule, the first."""
        return next(iter(self.schedules))


# Two CPU cores, under 90 minutes. Objects are few and large, so that a detector learns something in a minute on one core.
SMALL = Preset(
    world="--image_size 96 --num_unlabelled 3000 --num_train 800 --num_val 400 --max_objects 2 --min_object 0.3 --seed 1 "
          "--crowd_share 0",
    backbone="--steps 2000",
    model="--backbone resnet18 --backbone_last_layer layer3 --hidden_dim 64 --nheads 4 --dim_feedforward 256 --enc_layers 2 "
          "--dec_layers 3 --num_queries 16 --dropout 0 --num_workers 0 --lr 1e-3",
    detr="--pre_norm",
    deformable="--num_feature_levels 1",
    updetr="--patch_size 32 --min_patch 24 --max_patch 72 --pretrain_sizes 96 --pretrain_max_size 96 --batch_size 16",
    detreg="--max_prop 10 --patch_size 32 --pretrain_sizes 96 --pretrain_max_size 96 --crop_resize 96 --crop_size 1000 1000 "
           "--batch_size 16",
    finetune="--train_sizes 96 --crop_resize 96 --crop_size 1000 1000 --val_size 96 --max_size 96 --batch_size 8 "
             "--lr_backbone 0",
    num_patches=4, pretrain_epochs=3, detreg_epochs=3, schedules={"short": 5, "long": 10}, evaluations=5,
)
# A GPU. Everything is larger, and trains longer.
LARGE = dataclasses.replace(
    SMALL,
    world="--image_size 192 --num_unlabelled 20000 --num_train 4000 --num_val 2000 --seed 1",
    backbone="--steps 4000 --num_images 30000 --batch_size 64",
    model="--backbone resnet18 --backbone_last_layer layer3 --hidden_dim 128 --nheads 8 --dim_feedforward 512 --enc_layers 3 "
          "--dec_layers 3 --num_queries 32 --dropout 0 --num_workers 3 --lr 5e-4",
    updetr="--patch_size 48 --min_patch 24 --max_patch 144 --pretrain_sizes 192 --pretrain_max_size 192 --batch_size 64",
    detreg="--max_prop 20 --patch_size 48 --pretrain_sizes 192 --pretrain_max_size 192 --crop_resize 192 "
           "--crop_size 1000 1000 --batch_size 64",
    finetune="--train_sizes 192 --crop_resize 192 --crop_size 1000 1000 --val_size 192 --max_size 192 --batch_size 32 "
             "--lr_backbone 0",
    num_patches=8, pretrain_epochs=30, detreg_epochs=30, schedules={"short": 20, "long": 60}, evaluations=10,
)

PRESETS = {"small": SMALL, "large": LARGE}


def load_preset(name: str) -> Preset:
    """A preset by its name, or from a JSON file: {"base": "small", attribute: value, …}, where the base's attributes hold
    unless the file has them.

    Raises:
        InputError: if there is none, or the file isn't one.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        found: Dict[str, Any] = read_json(name)
        base = PRESETS[found.pop("base", "small")]
        changes = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
        return dataclasses.replace(base, **changes)
    except InputError as error:
        raise InputError(f"--preset {shown(name)} is not a preset, {' or '.join(PRESETS)}, nor the file of one "
                         f"({error})") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"--preset {name} is not a preset ({error})") from error
