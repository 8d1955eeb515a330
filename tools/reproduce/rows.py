"""What is compared, and the runs that this takes: a cell is a command, its name and the cells that it needs."""
import functools
import shlex
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from tools.demo import drop_epoch
from tools.reproduce.presets import Preset

WORLD, HALVES, BACKBONE, PROPOSALS = "shared/world", "shared/halves", "shared/backbone", "shared/proposals"
# The validation images' halves: what is reported is measured on the one, whoever chooses something uses the other.
REPORT, CHOOSE = "report", "choose"


class Row(NamedTuple):
    """A way to start a detector.

    Attributes:
        title: as the tables name it.
        model: main.py's --model.
        pretext: "updetr", "detreg" or "" for none.
        patches: M is `Preset.num_patches`, or 1.
        flags: of the pre-training.
    """

    title: str
    model: str = "detr"
    pretext: str = ""
    patches: bool = True
    flags: str = ""


ROWS: Dict[str, Row] = {
    "scratch": Row("DETR, scratch"),
    "updetr_1patch": Row("UP-DETR, M = 1", pretext="updetr", patches=False, flags="--feature_recon --fre_cnn"),
    "updetr": Row("UP-DETR, M > 1", pretext="updetr", flags="--feature_recon --fre_cnn"),
    "updetr_no_reconstruction": Row("… without feature reconstruction", pretext="updetr", flags="--fre_cnn"),
    "updetr_unfrozen_cnn": Row("… with the CNN trained", pretext="updetr", flags="--feature_recon"),
    "updetr_no_attention_mask": Row("… without attention mask", pretext="updetr",
                                    flags="--feature_recon --fre_cnn --no_attention_mask"),
    "updetr_query_shuffle": Row("… with query shuffle", pretext="updetr",
                                flags="--feature_recon --fre_cnn --query_shuffle"),
    "updetr_within_group": Row("… matched within groups", pretext="updetr",
                               flags="--feature_recon --fre_cnn --match_within_group"),
    "detreg": Row("DETReg on DETR", pretext="detreg"),
    "deformable_scratch": Row("Deformable DETR, scratch", model="deformable_detr"),
    "deformable_detreg": Row("DETReg on Deformable DETR", model="deformable_detr", pretext="detreg"),
}
# Rows that are also fine-tuned in the long schedules; ablations are compared after the first, shortest one.
LONG = ("scratch", "updetr", "updetr_within_group", "detreg", "deformable_scratch", "deformable_detreg")
# Rows that are also trained on few labels.
LOW_LABEL = ("scratch", "updetr", "detreg", "deformable_scratch", "deformable_detreg")
# Equal total compute: the row from scratch that gets as much time as pre-training and short fine-tuning of the other took.
AS_LONG_AS: Dict[str, str] = {"updetr": "scratch", "detreg": "scratch", "deformable_detreg": "deformable_scratch"}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        name: "SEED/ROW/RUN"; its folder under the reproduction's.
        kind: cells of one kind take as long.
        command: words after the interpreter's, given the seconds that finished cells took.
    """

    name: str
    kind: str
    command: Callable[[Mapping[str, float]], List[str]]
    needs: Tuple[str, ...] = ()


class Plan:
    """The cells of a reproduction.

    Args:
        preset: how large it is.
        folder: where it all lies.
        rows: names in `ROWS`.
        seeds: one training each.
        half: of the validation images, REPORT or CHOOSE.
        device: main.py's --device, or "" for its default.
    """

    def __init__(self, preset: Preset, folder: str, rows: Sequence[str], seeds: Sequence[int], half: str = REPORT,
                 device: str = "") -> None:
        self.preset, self.folder, self.rows, self.seeds, self.half, self.device = preset, folder, rows, seeds, half, device

    def cells(self) -> List[Cell]:
        """All of them; what a cell needs comes before it."""
        chosen = [ROWS[name] for name in self.rows]
        annotations = self.path(WORLD, "toy/coco/annotations")
        found = [Cell(WORLD, "world", lambda _: ["-m", "datasets.toy", "--output_dir", self.path(WORLD, "toy"),
                                                 *shlex.split(self.preset.world)]),
                 Cell(HALVES, "halves", lambda _: [
                     "-m", "tools.reproduce.halves", f"{annotations}/instances_val2017.json",
                     *(f"{annotations}/{half}.json" for half in (REPORT, CHOOSE))], (WORLD,)),
                 Cell(BACKBONE, "backbone", lambda _: [
                     "-m", "tools.pretrain_toy_backbone", "--output", self.path(BACKBONE, "backbone.pth"),
                     *shlex.split(self.preset.backbone), *self._on_device()])]
        if any(row.pretext == "detreg" for row in chosen):
            found.append(Cell(PROPOSALS, "proposals", lambda _: [
                "-m", "tools.cache_proposals", "--imagenet_path", self.unlabelled(), "--cache_path",
                self.path(PROPOSALS, "cache")], (WORLD,)))
        for seed in self.seeds:
            for name in self.rows:
                found += self._of_row(seed, name)
            found += self._as_long(seed)
        return found

    def path(self, cell: str, file: str = "") -> str:
        """A file in a cell's folder."""
        return "/".join(filter(None, (self.folder, cell, file)))

    def unlabelled(self) -> str:
        return self.path(WORLD, "toy/unlabelled")

    def _on_device(self) -> List[str]:
        return ["--device", self.device] if self.device else []

    def _of_row(self, seed: int, name: str) -> List[Cell]:
        row, preset = ROWS[name], self.preset
        cells = []
        if row.pretext:
            cells.append(self._pretrain(seed, name))
        for schedule, epochs in preset.schedules.items():
            if name in LONG or schedule == preset.shortest:
                cells.append(self._finetune(seed, name, schedule, lambda _, epochs=epochs: epochs))
        for percent in preset.labels:
            if percent < 100 and name in LOW_LABEL:
                epochs = round(preset.schedules[preset.shortest] * 100 / percent)
                cells.append(self._finetune(seed, name, f"labels_{percent}", lambda _, epochs=epochs: epochs, percent))
        return cells

    def _as_long(self, seed: int) -> List[Cell]:
        """Trainings from scratch of equal total compute."""
        schedule = self.preset.shortest
        cells = []
        for name, scratch in AS_LONG_AS.items():
            if name in self.rows and scratch in self.rows:
                times = (f"seed{seed}/{name}/pretrain", f"seed{seed}/{name}/{schedule}", f"seed{seed}/{scratch}/{schedule}")
                cells.append(self._finetune(seed, scratch, schedule, functools.partial(self._equal_epochs, times),
                                            as_long_as=name, needs=times))
        return cells

    def _equal_epochs(self, times: Tuple[str, str, str], seconds: Mapping[str, float]) -> int:
        pretrain, finetune, alone = (seconds[cell] for cell in times)
        return max(1, round(self.preset.schedules[self.preset.shortest] * (pretrain + finetune) / alone))

    def _main(self, seed: int, cell: str, row: Row, *flags: str) -> List[str]:
        kind = self.preset.detr if row.model == "detr" else self.preset.deformable
        return ["main.py", "--model", row.model, *shlex.split(self.preset.model), *shlex.split(kind), *flags,
                *self._on_device(), "--seed", str(seed), "--output_dir", self.path(cell), "--resume", "auto"]

    def _pretrain(self, seed: int, name: str) -> Cell:
        row, preset, cell = ROWS[name], self.preset, f"seed{seed}/{name}/pretrain"
        flags = [*shlex.split(row.flags), "--imagenet_path", self.unlabelled(), "--load_backbone",
                 self.path(BACKBONE, "backbone.pth")]
        needs: Tuple[str, ...] = (WORLD, BACKBONE)
        if row.pretext == "updetr":
            epochs = preset.pretrain_epochs
            flags += [*shlex.split(preset.updetr), "--num_patches", str(preset.num_patches if row.patches else 1),
                      "--imagenet_val_path", self.path(WORLD, "toy/coco/val2017"), "--eval_every", str(epochs)]
        else:
            epochs = preset.detreg_epochs
            flags += ["--dataset_file", "regions", "--object_embedding_loss", *shlex.split(preset.detreg), "--cache_path",
                      self.path(PROPOSALS, "cache")]
            needs += (PROPOSALS,)
        command = self._main(seed, cell, row, *flags, *schedule_flags(epochs))
        return Cell(cell, f"pretrain {name}", lambda _: command, needs)

    def _finetune(self, seed: int, name: str, schedule: str, epochs: Callable[[Mapping[str, float]], int],
                  percent: int = 100, as_long_as: str = "", needs: Tuple[str, ...] = ()) -> Cell:
        row, preset = ROWS[name], self.preset
        cell = f"seed{seed}/{name}/{schedule}" + (f"_as_long_as_{as_long_as}" if as_long_as else "")
        start = ["--load_backbone", self.path(BACKBONE, "backbone.pth")]
        needs = (*needs, HALVES, BACKBONE)
        if row.pretext:
            start = ["--pretrain", self.path(f"seed{seed}/{name}/pretrain", "checkpoint.pth")]
            needs = (*needs, f"seed{seed}/{name}/pretrain")
        labels = ["--filter_pct", f"{percent / 100:g}", "--filter_seed", str(seed)] if percent < 100 else []

        def command(seconds: Mapping[str, float]) -> List[str]:
            count = epochs(seconds)
            every = max(1, count // preset.evaluations)
            return self._main(seed, cell, row, *shlex.split(preset.finetune), *start, *labels,
                              "--coco_path", self.path(WORLD, "toy/coco"), "--val_annotations",
                              f"annotations/{self.half}.json", "--eval_every", str(every), "--save_every", str(every),
                              *schedule_flags(count))

        return Cell(cell, f"fine-tune {row.model} {schedule}" + as_long_as, command, needs)


def schedule_flags(epochs: int) -> List[str]:
    """As the demo's."""
    return ["--epochs", str(epochs), "--lr_drop", str(drop_epoch(epochs))]
