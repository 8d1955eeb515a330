"""The main job from nothing to pictures: make a small world, pre-train UP-DETR on its unlabelled images, fine-tune DETR from
that and from scratch, compare. Every step is a command that a user could type; it is printed before it runs.

With --detreg it also pre-trains DETReg, on regions that selective search proposes, and fine-tunes from that as well.

A demo that was stopped goes on where it was.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from tools.output import replace_json, writing
from util.errors import InputError, run_program
from util.files import read_json
from util.ranges import TOOL_RANGES, check_ranges, count

# Small images of few and large objects: what a detector learns of them in minutes is more than noise.
WORLD = "--image_size 96 --max_objects 3 --min_object 0.3".split()
BACKBONE_STEPS = 2000
# A detector small enough for two CPU cores: stride 16, 64 channels, 2 + 3 layers.
MODEL = ("--backbone resnet18 --backbone_last_layer layer3 --hidden_dim 64 --nheads 4 --dim_feedforward 256 --enc_layers 2 "
         "--dec_layers 3 --num_queries 16 --dropout 0 --pre_norm --num_workers 1").split()
PRETRAIN = ("--feature_recon --fre_cnn --match_within_group --num_patches 16 --patch_size 32 --min_patch 24 --max_patch 72 "
            "--pretrain_sizes 96 --pretrain_max_size 96 --held_out_share 0.03 --lr 1e-3").split()
PRETRAIN_BATCH = 16  # images a step, over all processes
# Ten regions for the sixteen queries; never cropped, as below.
REGIONS = ("--dataset_file regions --model detr --object_embedding_loss --max_prop 10 --patch_size 32 --pretrain_sizes 96 "
           "--pretrain_max_size 96 --crop_resize 96 --crop_size 1000 1000 --lr 1e-3").split()
# Images are never cropped (a crop larger than the image leaves it whole): in a training as short as this one, random crops
# cost more than they teach.
FINETUNE = ("--train_sizes 96 --crop_resize 96 --crop_size 1000 1000 --val_size 96 --max_size 96 --batch_size 8 --lr 1e-3 "
            "--lr_backbone 0").split()
# Whose boxes' recall is measured, and the name of the file with it.
RECALL = {"selective search": "recall_search.json", "DETReg before any label": "recall_detreg.json"}
THRESHOLD = 0.5  # least score of the detections that are drawn


class Arm(NamedTuple):
    """A fine-tuning: its folder, its name in the table, and the flags that say what it starts from."""

    folder: str
    label: str
    start: List[str]


class Figures(NamedTuple):
    """Of an evaluation: AP and AP50 in 0..1, and the validation loss."""

    ap: float
    ap50: float
    loss: float


def _read_phases(path: Path) -> Dict[str, Dict[str, Any]]:
    phases = read_json(path, "the demo's record")
    if isinstance(phases, dict) and all(isinstance(phase, dict) and {"commands", "seconds"} <= set(phase)
                                        for phase in phases.values()):
        return phases
    raise InputError(f"{path} is damaged: choose another --output_dir, or delete that folder")


class Demo:
    """The phases, their wall times and their results, in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.output_dir)
        self.phases_file = self.folder / "phases.json"
        if os.path.isdir(self.folder) and not os.path.exists(self.phases_file) and os.listdir(self.folder):
            raise InputError(f"--output_dir {self.folder} has other files in it than a demo's: choose an empty or a new folder")
        with writing("--output_dir", args.output_dir):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.phases_file.exists():
                replace_json(self.phases_file, {})
        # By the name of a phase that is finished: its "commands", and the "seconds" that they took side by side.
        self.finished: Dict[str, Dict[str, Any]] = _read_phases(self.phases_file)
        self.toy, self.backbone = self.path("toy"), self.path("backbone.pth")
        self.arms = [Arm("scratch", "scratch", ["--load_backbone", self.backbone]),
                     Arm("pretrained", "UP-DETR", ["--pretrain", self.path("pretrain/checkpoint.pth")])]
        if args.detreg:
            self.arms.append(Arm("detreg", "DETReg", ["--pretrain", self.path("pretrain_detreg/checkpoint.pth")]))

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def phase(self, name: str, *commands: List[str], processes: int = 1, logs: Optional[List[str]] = None) -> None:
        """Run commands, each of so many processes, side by side and note how long they took; a phase that has been finished
        before is passed over.

        Raises:
            InputError: if a command fails, or the phase was finished with other commands.
        """
        if name in self.finished:
            if self.finished[name]["commands"] != list(commands):
                raise InputError(f"--output_dir {self.folder} holds a demo whose {name} had other flags: choose an empty or a "
                                 "new folder")
            print(f"== {name}: done before, in {self.finished[name]['seconds']:.0f} s", flush=True)
            return
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        threads = max(1, (os.cpu_count() or 1) // (len(commands) * processes))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        running = []
        for number, command in enumerate(commands):
            print("$ python " + " ".join(command), flush=True)
            output = open(logs[number], "a") if logs else None
            running.append(subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output))
        self._wait(name, running, logs)
        self.finished[name] = {"seconds": time.perf_counter() - start, "commands": list(commands)}
        replace_json(self.phases_file, self.finished)

    def _wait(self, name: str, running: List[subprocess.Popen], logs: Optional[List[str]]) -> None:
        try:
            codes = [process.wait() for process in running]
        finally:
            for process in running:
                if process.poll() is None:
                    process.terminate()
        for number, code in enumerate(codes):
            if code:
                raise InputError(f"{name}: a command failed with status {code}" + (f", see {logs[number]}" if logs else ""))

    def train_command(self, run: str, *flags: str) -> List[str]:
        return ["main.py", *MODEL, *flags, "--seed", str(self.args.seed), "--output_dir", self.path(run), "--resume", "auto"]

    def run(self) -> None:
        args = self.args
        self.phase("toy data", ["-m", "datasets.toy", "--output_dir", self.toy, *WORLD,
                                "--num_unlabelled", str(args.num_unlabelled),
                                "--num_train", str(args.num_labelled), "--num_val", str(args.num_val)])
        self.phase("backbone weights", ["-m", "tools.pretrain_toy_backbone", "--output", self.backbone,
                                        "--steps", str(BACKBONE_STEPS), "--seed", str(args.seed)])
        self.pretrain("pre-training", "pretrain", args.pretrain_epochs, *PRETRAIN,
                      "--eval_every", str(max(1, args.pretrain_epochs // 4)))
        self.finetune("fine-tuning", self.arms[:2])
        if args.detreg:
            cached = ["--class_list", self.list_half(), "--cache_path", self.path("proposals")]
            self.phase("region proposals", ["-m", "tools.cache_proposals", "--imagenet_path", f"{self.toy}/unlabelled",
                                            *cached])
            self.pretrain("pre-training DETReg", "pretrain_detreg", 2 * args.pretrain_epochs, *REGIONS, *cached)
            self.finetune("fine-tuning from DETReg", self.arms[2:])
        self.pictures()
        self.report()

    def list_half(self) -> str:
        """Write down half of the folders of unlabelled images; DETReg sees them twice as often as UP-DETR sees all.

        It saves time: selective search is slow.
        """
        folders = sorted(os.listdir(f"{self.toy}/unlabelled"))
        path = self.path("region_folders.txt")
        Path(path).write_text("\n".join(folders[:(len(folders) + 1) // 2]) + "\n")
        return path

    def pretrain(self, name: str, run: str, epochs: int, *flags: str) -> None:
        """A phase that trains without labels, in two processes: two cores do more with them than with two threads."""
        processes = min(2, os.cpu_count() or 1)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
        self.phase(name, launcher + self.train_command(
            run, *flags, "--batch_size", str(PRETRAIN_BATCH // processes), "--imagenet_path", f"{self.toy}/unlabelled",
            "--load_backbone", self.backbone, "--epochs", str(epochs), "--lr_drop", str(drop_epoch(epochs))),
            processes=processes)

    def finetune(self, name: str, arms: Sequence[Arm]) -> None:
        """A phase that trains on the labelled images, alike for each arm."""
        args = self.args
        common = [*FINETUNE, "--coco_path", f"{self.toy}/coco", "--epochs", str(args.epochs),
                  "--lr_drop", str(drop_epoch(args.epochs)), "--eval_every", str(args.eval_every)]
        self.phase(name, *[self.train_command(arm.folder, *common, *arm.start) for arm in arms],
                   logs=[self.path(f"{arm.folder}.txt") for arm in arms])

    def pictures(self) -> None:
        """Draw detections in the fullest images, found patches in the image whose three largest objects are largest,
        regions and learning curves."""
        boxes, files = self.validation_images()
        fullest = [files[image] for image in sorted(files, key=lambda image: -len(boxes[image]))[:12]]
        self.phase("pictures of detections", [
            "-m", "tools.predict", "--checkpoint", self.path("pretrained/checkpoint.pth"), "--threshold", str(THRESHOLD),
            "--output_dir", self.path("predictions"), *fullest])
        large = {image: sorted(mine, key=lambda box: -min(box[2:]))[:3] for image, mine in boxes.items()
                 if len(mine) >= 3}
        chosen = max(large, key=lambda image: min(large[image][-1][2:]))
        shown = [flag for box in large[chosen] for flag in ("--box", ",".join(map(str, box)))]
        self.phase("picture of patches", ["-m", "tools.find_patch", "--checkpoint", self.path("pretrain/checkpoint.pth"),
                                          files[chosen], *shown, "--output", self.path("find_patch.png")])
        if self.args.detreg:
            self.regions(fullest[:4])
        self.phase("picture of curves" + " with DETReg" * self.args.detreg, [
            "-m", "tools.plot_logs", *[self.path(arm.folder) for arm in self.arms],
            "--output", self.path(self.own("curves.png"))])

    def validation_images(self) -> Tuple[Dict[int, List[List[float]]], Dict[int, str]]:
        """By id of a validation image: the boxes (x, y, width, height) in it, crowds aside; its file."""
        coco = json.loads(Path(f"{self.toy}/coco/annotations/instances_val2017.json").read_text())
        return boxes_by_image(coco), {image["id"]: f"{self.toy}/coco/val2017/{image['file_name']}" for image in coco["images"]}

    def regions(self, images: Sequence[str]) -> None:
        """Draw regions and measure how well they cover objects: selective search's, and those that DETReg finds before
        it has seen a label."""
        model = ["--checkpoint", self.path("pretrain_detreg/checkpoint.pth")]
        self.phase("picture of regions", ["-m", "tools.show_regions", *model, *images, "--num_boxes", "6",
                                          "--output", self.path("regions.png")])
        for (name, file), source in zip(RECALL.items(), (["--selective_search"], model)):
            self.phase(f"recall of {name}", ["-m", "tools.proposal_recall", *source, "--coco_path", f"{self.toy}/coco",
                                             "--output", self.path(file)])

    def own(self, name: str) -> str:
        """What a demo with DETReg calls a file of which the demo without it has another version."""
        return name.replace(".", "_detreg.") if self.args.detreg else name

    def report(self) -> None:
        """Print the comparison and keep it as summary.json."""
        curves = {arm.label: {line["epoch"] + 1: Figures(*line["test_coco_eval_bbox"][:2], line["test_loss"])
                              for line in read_log(self.path(f"{arm.folder}/log.txt")) if "test_loss" in line}
                  for arm in self.arms}
        patches = [line for line in read_log(self.path("pretrain/log.txt")) if "test_patch_iou" in line][-1]
        seconds = {name: phase["seconds"] for name, phase in self.finished.items()}
        evaluations = {label: {epoch: figures._asdict() for epoch, figures in curve.items()} for label, curve in curves.items()}
        summary = {"seed": self.args.seed, "evaluations": evaluations, "patches": patches, "seconds": seconds}
        rows = ["", *table(curves), "",
                f"patches found: mean IoU {patches['test_patch_iou']:.3f}, control (another image's patches) "
                f"{patches['test_control_iou']:.3f}"]
        if self.args.detreg:
            summary["recall"] = {name: json.loads(Path(self.path(file)).read_text()) for name, file in RECALL.items()}
            rows += [f"objects covered by an image's 10 best boxes of {name}: average recall "
                     f"{100 * found['10']['AR']:.1f}, at IoU 0.5 {100 * found['10']['R50']:.1f}"
                     for name, found in summary["recall"].items()]
        rows += ["", *(f"{name:>33}: {taken:5.0f} s" for name, taken in seconds.items()),
                 f"{'total':>33}: {sum(seconds.values()):5.0f} s", "",
                 f"detections: {self.path('predictions')}", f"patches found: {self.path('find_patch.png')}",
                 f"learning curves: {self.path(self.own('curves.png'))}",
                 *([f"regions proposed and found: {self.path('regions.png')}"] if self.args.detreg else [])]
        print("\n".join(rows))
        (self.folder / self.own("summary.json")).write_text(json.dumps(summary, indent=1))


def boxes_by_image(coco: Dict[str, Any]) -> Dict[int, List[List[float]]]:
    """By id of an image in a COCO-format file: the boxes (x, y, width, height) in it, crowds aside."""
    boxes: Dict[int, List[List[float]]] = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            boxes[annotation["image_id"]].append(annotation["bbox"])
    return boxes


def table(curves: Dict[str, Dict[int, Figures]]) -> List[str]:
    """Lines with AP and AP50 in percent and the loss at each epoch at which all trainings were evaluated, and AP50 as a
    multiple of the first training's.

    Args:
        curves: evaluations by the training's name and by epoch.
    """
    first, *others = curves
    heads = [f"{name} ratio" for name in others] if len(others) > 1 else ["AP50 ratio"]
    lines = [" | ".join([f"{'epoch':>6}", *(f"{name + ' AP':>10} {'AP50':>6} {'loss':>6}" for name in curves), *heads])]
    for epoch in sorted(set.intersection(*map(set, curves.values()))):
        found = {name: curve[epoch] for name, curve in curves.items()}
        base = found[first].ap50
        ratios = [f"{found[name].ap50 / base:.2f}" if base > 0 else "-" for name in others]
        lines.append(" | ".join([
            f"{epoch:6d}",
            *(f"{100 * figures.ap:10.1f} {100 * figures.ap50:6.1f} {figures.loss:6.2f}" for figures in found.values()),
            *(f"{ratio:>{len(head)}}" for ratio, head in zip(ratios, heads))]))
    return lines


def read_log(path: str) -> List[Dict[str, Any]]:
    """All lines of a log.txt."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def drop_epoch(epochs: int) -> int:
    """The learning rate falls at 80 % of a training."""
    return max(1, round(0.8 * epochs))


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.demo", description=__doc__)
    parser.add_argument("--output_dir", default="outputs/demo")
    parser.add_argument("--seed", type=int, default=1, help="seed of the trainings; the world stays the same")
    parser.add_argument("--num_unlabelled", type=int, default=4800)
    parser.add_argument("--num_labelled", type=int, default=500)
    parser.add_argument("--num_val", type=int, default=200)
    parser.add_argument("--pretrain_epochs", type=int, default=4, help="of UP-DETR's pre-training")
    parser.add_argument("--epochs", type=int, default=12, help="of each fine-tuning")
    parser.add_argument("--eval_every", type=int, default=4)
    parser.add_argument("--detreg", action="store_true", help="with DETReg")
    return parser


def main(args: argparse.Namespace) -> None:
    """Check the flags and run the phases."""
    check_ranges(args, {**TOOL_RANGES, "epochs": count()})
    Demo(args).run()


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
