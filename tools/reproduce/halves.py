"""Share out a COCO-format annotation file's images among two files: `python -m tools.reproduce.halves FILE HALF HALF`."""
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

from util.errors import InputError, run_program


def halve(coco: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Two annotation files of one: images take turns in the order of their ids, and objects go with their images."""
    images = sorted(coco["images"], key=lambda image: image["id"])
    halves = []
    for first in (0, 1):
        mine = images[first::2]
        ids = {image["id"] for image in mine}
        halves.append({**coco, "images": mine,
                       "annotations": [found for found in coco["annotations"] if found["image_id"] in ids]})
    return halves


def main() -> None:
    """Read, share out, write."""
    if len(sys.argv) != 4:
        raise InputError("three files are needed: the annotations, and two to write")
    source, *targets = map(Path, sys.argv[1:])
    for target, half in zip(targets, halve(json.loads(source.read_text(encoding="utf-8")))):
        target.write_text(json.dumps(half), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
