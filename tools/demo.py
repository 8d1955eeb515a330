"""The main job from nothing to pictures: make a small world, pre-train UP-DETR on its unlabelled images, fine-tune DETR from
that and from scratch, compare. Every step is a command that a user could type; it is printed before it runs.

A demo that was stopped goes on where it was.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from util.errors import InputError, run_program

# A detector small enough for two CPU cores: stride 16, 64 channels, 2 + 3 layers.
MODEL = ("--backbone resnet18 --backbone_last_layer layer3 --hidden_dim 64 --nheads 4 --dim_feedforward 256 --enc_layers 2 "
         "--dec_layers 3 --num_queries 16 --dropout 0 --pre_norm --num_workers 1").split()
PRETRAIN = ("--feature_recon --fre_cnn --match_within_group --num_patches 16 --patch_size 40 --min_patch 16 --max_patch 96 "
            "--pretrain_sizes 128 --pretrain_max_size 128 --held_out_share 0.03 --lr 1e-3").split()
PRETRAIN_BATCH = 16  # images a step, over all processes
# Images of 128 pixels, never cropped (a crop larger than the image leaves it whole): in a training as short as this one,
# random crops cost more than they teach.
FINETUNE = ("--train_sizes 128 --crop_resize 128 --crop_size 1000 1000 --val_size 128 --max_size 128 --batch_size 8 --lr 1e-3 "
            "--lr_backbone 0").split()
# Let glibc keep the memory of freed tensors rather than hand it back to the system and ask for it anew at every step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2 ** 30), "MALLOC_TRIM_THRESHOLD_": str(2 ** 30)}
ARMS = ("scratch", "pretrained")
THRESHOLD = 0.3  # least score of the detections that are drawn: after so short a training few are above 0.5


class Demo:
    """The phases, their wall times and their results, in one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = Path(args.output_dir)
        self.times_file = self.folder / "times.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds: Dict[str, float] = json.loads(self.times_file.read_text()) if self.times_file.exists() else {}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def phase(self, name: str, *commands: List[str], processes: int = 1, logs: Optional[List[str]] = None) -> None:
        """Run commands, each of so many processes, side by side and note how long they took; a phase that has been finished
        before is passed over."""
        if name in self.seconds:
            print(f"== {name}: done before, in {self.seconds[name]:.0f} s", flush=True)
            return
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        threads = max(1, (os.cpu_count() or 1) // (len(commands) * processes))
        environment = {"OMP_NUM_THREADS": str(threads), **KEEP_MEMORY, **os.environ}
        running = []
        for number, command in enumerate(commands):
            print("$ python " + " ".join(command), flush=True)
            output = open(logs[number], "a") if logs else None
            running.append(subprocess.Popen([sys.executable, *command], env=environment, stdout=output, stderr=output))
        self._wait(name, running, logs)
        self.seconds[name] = time.perf_counter() - start
        self.times_file.write_text(json.dumps(self.seconds))

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
        toy, backbone = self.path("toy"), self.path("backbone.pth")
        images, coco = f"{toy}/unlabelled", f"{toy}/coco"
        self.phase("toy data", ["-m", "datasets.toy", "--output_dir", toy, "--num_unlabelled", str(args.num_unlabelled),
                                "--num_train", str(args.num_labelled), "--num_val", str(args.num_val)])
        self.phase("backbone weights", ["-m", "tools.pretrain_toy_backbone", "--output", backbone, "--seed", str(args.seed)])
        processes = min(2, os.cpu_count() or 1)  # two small processes use two cores better than one with two threads
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        self.phase("pre-training", launcher + self.train_command(
            "pretrain", *PRETRAIN, "--batch_size", str(PRETRAIN_BATCH // processes), "--imagenet_path", images,
            "--load_backbone", backbone,
            "--epochs", str(args.pretrain_epochs), "--lr_drop", str(drop_epoch(args.pretrain_epochs)),
            "--eval_every", str(max(1, args.pretrain_epochs // 4))), processes=processes)
        common = [*FINETUNE, "--coco_path", coco, "--epochs", str(args.epochs), "--lr_drop", str(drop_epoch(args.epochs)),
                  "--eval_every", str(args.eval_every)]
        start_from = {"scratch": ["--load_backbone", backbone],
                      "pretrained": ["--pretrain", self.path("pretrain/checkpoint.pth")]}
        self.phase("fine-tuning", *[self.train_command(arm, *common, *start_from[arm]) for arm in ARMS],
                   logs=[self.path(f"{arm}.txt") for arm in ARMS])
        self.pictures(toy)
        self.report()

    def pictures(self, toy: str) -> None:
        """Draw detections in the fullest images, found patches in the image whose three largest objects are largest, and
        learning curves."""
        coco = json.loads(Path(f"{toy}/coco/annotations/instances_val2017.json").read_text())
        boxes: Dict[int, List[List[float]]] = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            if not annotation["iscrowd"]:
                boxes[annotation["image_id"]].append(annotation["bbox"])
        files = {image["id"]: f"{toy}/coco/val2017/{image['file_name']}" for image in coco["images"]}
        fullest = sorted(files, key=lambda image: -len(boxes[image]))[:12]
        self.phase("pictures of detections", [
            "-m", "tools.predict", "--checkpoint", self.path("pretrained/checkpoint.pth"), "--threshold", str(THRESHOLD),
            "--output_dir", self.path("predictions"), *[files[image] for image in fullest]])
        large = {image: sorted(mine, key=lambda box: -min(box[2:]))[:3] for image, mine in boxes.items() if len(mine) >= 3}
        chosen = max(large, key=lambda image: min(large[image][-1][2:]))
        shown = [flag for box in large[chosen] for flag in ("--box", ",".join(map(str, box)))]
        self.phase("picture of patches", ["-m", "tools.find_patch", "--checkpoint", self.path("pretrain/checkpoint.pth"),
                                          files[chosen], *shown, "--output", self.path("find_patch.png")])
        self.phase("picture of curves", ["-m", "tools.plot_logs", *[self.path(arm) for arm in ARMS],
                                         "--output", self.path("curves.png")])

    def report(self) -> None:
        """Print the comparison and keep it as summary.json."""
        curves = {arm: {line["epoch"] + 1: line["test_coco_eval_bbox"] for line in read_log(self.path(f"{arm}/log.txt"))
                        if "test_coco_eval_bbox" in line} for arm in ARMS}
        patches = [line for line in read_log(self.path("pretrain/log.txt")) if "test_patch_iou" in line][-1]
        rows = ["", f"{'epoch':>6} | {'scratch AP':>10} {'AP50':>6} | {'UP-DETR AP':>10} {'AP50':>6} | {'AP50 ratio':>10}"]
        for epoch in sorted(set(curves["scratch"]) & set(curves["pretrained"])):
            scratch, pretrained = (curves[arm][epoch] for arm in ARMS)
            ratio = f"{pretrained[1] / scratch[1]:.2f}" if scratch[1] > 0 else "-"
            rows.append(f"{epoch:6d} | {100 * scratch[0]:10.1f} {100 * scratch[1]:6.1f} | {100 * pretrained[0]:10.1f} "
                        f"{100 * pretrained[1]:6.1f} | {ratio:>10}")
        rows += ["", f"patches found: mean IoU {patches['test_patch_iou']:.3f}, control (another image's patches) "
                     f"{patches['test_control_iou']:.3f}", ""]
        rows += [f"{name:>20}: {seconds:5.0f} s" for name, seconds in self.seconds.items()]
        rows += [f"{'total':>20}: {sum(self.seconds.values()):5.0f} s", "",
                 f"detections: {self.path('predictions')}", f"patches found: {self.path('find_patch.png')}",
                 f"learning curves: {self.path('curves.png')}"]
        print("\n".join(rows))
        (self.folder / "summary.json").write_text(json.dumps(
            {"seed": self.args.seed, "curves": curves, "patches": patches, "seconds": self.seconds}, indent=1))


def read_log(path: str) -> List[Dict[str, Any]]:
    """All lines of a log.txt."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def drop_epoch(epochs: int) -> int:
    """The learning rate falls at 80 % of a training."""
    return max(1, round(0.8 * epochs))


def main() -> None:
    parser = argparse.ArgumentParser("demo", description=__doc__)
    parser.add_argument("--output_dir", default="outputs/demo")
    parser.add_argument("--seed", type=int, default=1, help="seed of the trainings; the world stays the same")
    parser.add_argument("--num_unlabelled", type=int, default=6400)
    parser.add_argument("--num_labelled", type=int, default=500)
    parser.add_argument("--num_val", type=int, default=200)
    parser.add_argument("--pretrain_epochs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=15, help="of each fine-tuning")
    parser.add_argument("--eval_every", type=int, default=5)
    Demo(parser.parse_args()).run()


if __name__ == "__main__":
    run_program(main)
