"""Read thousands of broken data sets: `python -m tools.fuzz`

Makes small COCO, panoptic and VOC data sets, each broken somewhere at random: values replaced by nonsense, removed, repeated
or exchanged, texts cut, bytes changed. Each is read as training, evaluation and `tools.check_data` would read it, and must
either be accepted or be refused in one sentence, within seconds: never in a traceback, never by hanging. The first data set
that isn't, made as simple as possible, is shown; the exit status is then 1. Needs the package hypothesis
(pip install -r requirements/test.txt).
"""
import argparse
import contextlib
import copy
import io
import json
import signal
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import numpy as np
from PIL import Image

from datasets import build_dataset, coco, get_coco_api_from_dataset, num_classes_and_names, objects_per_image, voc
from datasets.coco_eval import CocoEvaluator
from datasets.panoptic_eval import PanopticEvaluator
from datasets.survey import find_files, survey
from main import get_args_parser as get_training_parser
from tools import check_data, clean_copy
from util import recipes
from util.errors import InputError, run_program
from util.ranges import TOOL_RANGES, check_ranges

SECONDS = 20  # that reading a data set may take
LONGEST_SENTENCE = 1200
SIZES = {1: (40, 30), 2: (32, 32), 5: (24, 48)}  # width and height of the images by id
NONSENSE = [None, True, -1, 0, 2, 10**6 + 1, 2**31, 2**63, 10**400, -1e300, 0.5, 1e40, float("nan"), float("inf"), "", "1", "x",
            "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\n", "é" * 300, [], [[]], [None], ["x"], {}, {"id": 1},
            [1, 2, 3], [0, 0, 1e20, 1e20], [[1, 2]], {"size": [30, 40], "counts": "x"}, {"size": [1], "counts": []},
            {"size": [30, 40], "counts": [-1, 1201]}, {"counts": "0"}, [[0, 0, 1e9, 0, 1e9, 1e9]], [["a"] * 6]]


def coco_content() -> Dict[str, Any]:
    """An instances file with polygons, both kinds of run lengths, and a crowd."""
    images = [{"id": number, "file_name": f"{number}.png", "width": width, "height": height}
              for number, (width, height) in SIZES.items()]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0,
         "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 40, 30], "area": 1200, "iscrowd": 1,
         "segmentation": {"size": [30, 40], "counts": [0, 1200]}},
        {"id": 4, "image_id": 2, "category_id": 3, "bbox": [0, 0, 32, 32], "area": 1024, "iscrowd": 0,
         "segmentation": {"size": [32, 32], "counts": "0PP1"}},
    ]
    return {"images": images, "annotations": annotations, "categories": categories()}


def categories() -> List[Dict[str, Any]]:
    return [{"id": 1, "name": "cat", "isthing": 1}, {"id": 3, "name": "sky", "isthing": 0}]


def panoptic_content() -> Dict[str, Any]:
    """A panoptic file: the upper half of each image is segment 1, the lower segment 2."""
    content = coco_content()
    content["annotations"] = []
    for number, (width, height) in SIZES.items():
        segments = [{"id": place + 1, "category_id": (1, 3)[place], "area": width * height // 2, "iscrowd": 0,
                     "bbox": [0, place * (height // 2), width, height // 2]} for place in range(2)]
        content["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    return content


def voc_content(number: int) -> str:
    """The XML file of an image."""
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>20</ymax></bndbox>"
    objects = "".join(f"<object><name>{name}</name><difficult>{difficult}</difficult>{box}</object>"
                      for name, difficult in (("cat", 0), ("dog", 1)))
    return f"<annotation><filename>{number}.jpg</filename>{objects}</annotation>"


class Breaker:
    """Breaks things as a source of choices says.

    Args:
        choose: returns one of the items of a list.
    """

    def __init__(self, choose: Callable[[List[Any]], Any]) -> None:
        self.choose = choose

    def json(self, content: Dict[str, Any]) -> bytes:
        """A JSON file broken in one to three places, and perhaps as text."""
        content = copy.deepcopy(content)
        for _ in range(self.choose([1, 1, 2, 3])):
            self._break_value(content)
        text = json.dumps(content, ensure_ascii=self.choose([True, True, False])).encode("utf-8", "surrogatepass")
        return self.bytes(text) if self.choose([False] * 7 + [True]) else text

    def _break_value(self, content: Any) -> None:
        """Walks down at random, and breaks what is there."""
        while True:
            keys = list(content) if isinstance(content, dict) else list(range(len(content)))
            if not keys:
                return
            key = self.choose(keys)
            if isinstance(content[key], (dict, list)) and self.choose([True] * 4 + [False]):
                content = content[key]
                continue
            how = self.choose(["replace"] * 4 + ["remove", "repeat", "exchange"])
            if how == "remove":
                del content[key]
            elif how == "repeat" and isinstance(content, list):
                content.append(copy.deepcopy(content[key]))
            elif how == "exchange":
                other = self.choose(keys)
                content[key], content[other] = content[other], content[key]
            else:
                content[key] = copy.deepcopy(self.choose(NONSENSE))
            return

    def xml(self, text: str) -> bytes:
        """An XML file broken in one to three places, and perhaps as text."""
        root = ElementTree.fromstring(text)
        for _ in range(self.choose([1, 1, 2, 3])):
            parents = [element for element in root.iter() if len(element)]
            parent = self.choose(parents) if parents else root
            if not len(parent):
                continue
            child = self.choose(list(parent))
            how = self.choose(["replace"] * 3 + ["remove", "repeat"])
            if how == "remove":
                parent.remove(child)
            elif how == "repeat":
                parent.append(copy.deepcopy(child))
            else:
                child.text = self.choose(["", " ", "nan", "inf", "-5", "1e400", "12,5", "٣", "x" * 400, "../../a", "0x10",
                                          "\n7 "])
        broken = ElementTree.tostring(root, "utf-8")
        return self.bytes(broken) if self.choose([False] * 4 + [True]) else broken

    def bytes(self, content: bytes) -> bytes:
        """Bytes that are cut, changed, or something else altogether."""
        how = self.choose(["cut", "change", "insert", "other"])
        place = self.choose(list(range(len(content) + 1)))
        piece = self.choose([b"\0", b"\xff", b"{", b"]", b"<", b"&x;", b"1e999", b"NaN", b'"', b"\xed\xa0\x80"])
        if how == "other":
            return OTHER_FILES[self.choose(list(range(len(OTHER_FILES))))]
        return content[:place] + {"cut": b"", "change": piece + content[place + len(piece):],
                                  "insert": piece + content[place:]}[how]


OTHER_FILES = [
    b"", b"null", b"[]", b"{}", b"0", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe\0\0", b"\x89PNG\r\n", b"1" * 5000,
    b'{"images": {}, "annotations": {}, "categories": {}}', b'{"images": [], "annotations": [], "categories": []}',
    b"<annotation/>", b"<a>" * 50_000, b'<?xml version="1.0" encoding="x-unknown"?><annotation/>',
    b'<?xml version="1.0" encoding="utf-16"?><annotation/>', b'<?xml version="1.0" encoding="shift_jis"?><annotation/>',
    b'<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb">' + b"".join(b'<!ENTITY %c "%s">' % (c, b"&%c;" % (c - 1) * 10)
                                                       for c in range(ord("c"), ord("n"))) + b"]><a>&m;</a>",
    b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><object><name>&b;</name></object></annotation>',
]


class World:
    """A folder with images, of which data sets are written and read.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        devkit = folder / "VOC2007"
        for name in ("images", "panoptic", "VOC2007/JPEGImages", "VOC2007/Annotations", "VOC2007/ImageSets/Main"):
            (folder / name).mkdir(parents=True)
        for number, (width, height) in SIZES.items():
            picture = Image.new("RGB", (width, height), (90, 20 * number, 0))
            picture.save(folder / "images" / f"{number}.png")
            picture.save(devkit / "JPEGImages" / f"{number}.jpg")
            ids = np.zeros((height, width, 3), dtype=np.uint8)
            ids[:, :, 0] = 1 + (np.arange(height) >= height // 2)[:, None]
            Image.fromarray(ids).save(folder / "panoptic" / f"{number}.png")

    def write(self, kind: str, breaker: Breaker) -> List[str]:
        """Writes a broken data set; returns the flags that name it."""
        if kind == "voc":
            broken = breaker.choose(list(SIZES))
            for number in SIZES:
                content = voc_content(number)
                path = self.folder / f"VOC2007/Annotations/{number}.xml"
                path.write_bytes(breaker.xml(content) if number == broken else content.encode())
            names = "".join(f"{number}\n" for number in SIZES).encode()
            for part in ("trainval", "test"):
                broken = breaker.bytes(names) if breaker.choose([False] * 5 + [True]) else names
                (self.folder / f"VOC2007/ImageSets/Main/{part}.txt").write_bytes(broken)
            return ["--voc_path", str(self.folder)]
        content = coco_content() if kind == "coco" else panoptic_content()
        path = self.folder / f"{kind}.json"
        path.write_bytes(breaker.json(content))
        images = [f"--{part}_images={self.folder / 'images'}" for part in ("train", "val")]
        files = [f"--{part}_annotations={path}" for part in ("train", "val")]
        return ["--dataset_file", {"coco": "coco", "panoptic": "coco_panoptic"}[kind], "--masks", *images, *files]


def forget() -> None:
    """Lets go of files that were read: two that are written within a clock's tick would be taken for one."""
    coco.forget_files()
    coco._read_categories.cache_clear()
    voc.find_pictures.cache_clear()
    voc._class_names.cache_clear()


def train_and_evaluate(flags: List[str]) -> None:
    """Reads every sample of training and evaluation, and the evaluation's ground truth."""
    args = get_training_parser().parse_args(["--device", "cpu", "--train_sizes", "32", "--val_size", "32", "--max_size", "64",
                                             "--load_backbone", "none", *flags])
    recipes.resolve(args)
    args.num_classes, _ = num_classes_and_names(args)
    for part in ("val", "train"):
        dataset = build_dataset(part, args)
        objects_per_image(dataset)
        for index in range(len(dataset)):
            _, target = dataset[index]
            if not all(values.isfinite().all() for values in target.values()):
                raise AssertionError(f"a target is not finite: {target}")
            if not ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all():
                raise AssertionError(f"boxes are not within the image: {target}")
            if len(target["labels"]) and int(target["labels"].max()) >= args.num_classes:
                raise AssertionError(f"a label is not a class: {target}")
        if part == "val":
            evaluator = CocoEvaluator(get_coco_api_from_dataset(dataset), ["bbox"] + ["segm"] * bool(args.masks))
            evaluator.update({image_id: {name: target_free(name) for name in ("scores", "labels", "boxes", "masks")}
                              for image_id in dataset.ids})
            evaluator.synchronize_between_processes()
            evaluator.accumulate()
            evaluator.summarize()
            if hasattr(dataset, "coco_panoptic_json"):
                PanopticEvaluator(dataset.coco_panoptic_json, dataset.coco_panoptic_folder).summarize()


def target_free(name: str) -> Any:
    """No detections."""
    import torch

    return {"scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
            "masks": torch.zeros(0, 1, 8, 8, dtype=torch.bool)}[name]


def check_and_clean(flags: List[str]) -> None:
    """Lists the problems, as `tools.check_data` does, and makes the cleaned copy."""
    args = check_data.get_args_parser().parse_args(flags if "--voc_path" in flags or "coco_panoptic" not in flags
                                                   else [flag for flag in flags if flag != "--masks"])
    check_data.resolve(args)
    for part in ("train", "val"):
        found = survey(part, find_files(part, args), args)
        problems = list(found.problems)
        for check in found.checks:
            problems += check.run()
        for problem in problems:
            require_one_line(problem.sentence)
        if not found.unreadable and found.content is not None and "--voc_path" not in flags:
            clean_copy.clean(found.content, problems, args.masks)


def require_one_line(sentence: str) -> None:
    if not sentence or "\n" in sentence or len(sentence) > LONGEST_SENTENCE:
        raise AssertionError(f"this is not one sentence: {sentence!r}")


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer."""
    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def read_all(flags: List[str]) -> str:
    """Reads a data set in all ways; returns "accepted", or "refused" where training or evaluation refuse it in a sentence."""
    outcome = "accepted"
    for read in (train_and_evaluate, check_and_clean):
        forget()
        output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with at_most(SECONDS), contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            try:
                read(flags)
            except InputError as error:
                require_one_line(error.sentence)
                outcome = "refused" if read is train_and_evaluate else outcome
    return outcome


def fuzz(kind: str, examples: int, seed: int = 0) -> Counter:
    """Break and read data sets of a kind ("coco", "panoptic", "voc"); returns how often each outcome was.

    Raises:
        whatever reading one of them raises besides InputError.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    outcomes: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))

        @seeded(seed)
        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                  phases=(Phase.generate, Phase.shrink))
        @given(st.data())
        def check(data: Any) -> None:
            flags = world.write(kind, Breaker(lambda items: data.draw(st.sampled_from(items))))
            outcomes[read_all(flags)] += 1

        check()
    return outcomes


KINDS = ("coco", "panoptic", "voc")


def get_args_parser() -> argparse.ArgumentParser:
    """The program's flags."""
    parser = argparse.ArgumentParser("python -m tools.fuzz", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="data sets of each kind (1000)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of data sets (all)")
    parser.add_argument("--seed", type=int, default=0, help="decides which (0)")
    return parser


def main(args: argparse.Namespace) -> None:
    """Fuzz and say what came of it."""
    check_ranges(args, TOOL_RANGES)
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise InputError(f"this needs the package hypothesis, which can't be imported ({error}): "
                         "pip install -r requirements/test.txt") from error
    for kind in args.kinds:
        outcomes = fuzz(kind, args.examples, args.seed)
        print(f"{kind}: {sum(outcomes.values())} broken data sets, "
              f"{', '.join(f'{count} {outcome}' for outcome, count in sorted(outcomes.items()))}", flush=True)


if __name__ == "__main__":
    run_program(lambda: main(get_args_parser().parse_args()))
