"""Nothing that is read can execute code, reach files outside its folder, or overwrite what isn't the program's own."""
import ast
import json
import os
import pickle
import random
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import hubconf
from datasets.coco import CocoDetection
from datasets.coco_panoptic import CocoPanoptic
from datasets.image_io import UnreadableImage, read_image
from datasets.proposal_cache import Entry, ProposalCache
from datasets.voc import find_pictures
from models.backbone import build_backbone
from tools import convert_airbus
from tools.loading import DETECTOR, load_model
from tools.output import refuse_others, remember
from util import plot_utils
from util.checkpoint import load_checkpoint
from util.errors import InputError
from util.training_state import find_resume


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def trapped_checkpoint(folder):
    """A checkpoint with a trap, and what the trap makes."""
    path, trace = folder / "checkpoint.pth", folder / "executed"
    torch.save({"model": {"weight": torch.zeros(1)}, "epoch": Trap(trace)}, path)
    return str(path), trace


def repacked(source, target):
    """The same archive, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename))


def test_small_files_that_would_fill_the_memory_are_refused(tmp_path):
    torch.save({"model": {"weight": torch.zeros(2_000_000)}}, tmp_path / "large.pth")
    repacked(tmp_path / "large.pth", tmp_path / "bomb.pth")
    with pytest.raises(InputError, match=r"bomb.pth: not a checkpoint, or damaged \(ValueError: its \d+ bytes unpack to 8000\d+\)"):
        load_checkpoint(str(tmp_path / "bomb.pth"))
    for number, zipped in enumerate((True, False)):
        torch.save({"model": {"weight": torch.zeros(1).expand(2**40)}}, tmp_path / f"{number}.pth",
                   _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match=r"a tensor of shape \[1099511627776\] is stored as 4 bytes"):
            load_checkpoint(str(tmp_path / f"{number}.pth"))
    torch.save({"model": {"weight": torch.rand(200_000)}}, tmp_path / "honest.pth")
    repacked(tmp_path / "honest.pth", tmp_path / "packed.pth")
    assert load_checkpoint(str(tmp_path / "packed.pth"))["model"]["weight"].shape == (200_000,)


def load_backbone(path, tiny_args):
    build_backbone(tiny_args(load_backbone=path))


LOADERS = {
    "load_checkpoint": lambda path, tiny_args: load_checkpoint(path),
    "--load_backbone": load_backbone,
    "tools": lambda path, tiny_args: load_model(path, DETECTOR, "cpu"),
    "hub": lambda path, tiny_args: hubconf.detr_resnet50(pretrained=path),
    "--resume auto": lambda path, tiny_args: load_checkpoint(find_resume(
        tiny_args(resume="auto", output_dir=os.path.dirname(path))) or path),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_a_checkpoint_is_never_executed(tmp_path, loader, tiny_args):
    path, trace = trapped_checkpoint(tmp_path)
    with pytest.raises(InputError):
        LOADERS[loader](path, tiny_args)
    assert not trace.exists()


def test_programs_and_archives_are_no_checkpoints(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "program.pth"))
    with tarfile.open(tmp_path / "archive.pth", "w") as archive:
        archive.add(tmp_path / "program.pth", "pickle")
    for name in ("program.pth", "archive.pth"):
        with pytest.raises(InputError, match=f"{name}: refused, since it holds Python objects other than tensors"):
            load_checkpoint(str(tmp_path / name))


def test_code_in_a_proposal_cache_is_never_executed(tmp_path):
    cache = ProposalCache.create(tmp_path / "cache", 1)
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "executed")
    np.savez(tmp_path / "cache" / "proposals-00000.npz", names=trap, file_sizes=trap, ends=trap, boxes=trap)
    with pytest.raises(InputError, match="proposals-00000.npz of the proposal cache is damaged"):
        cache.read(0)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("read", [
    lambda path: CocoDetection(path.parent, path), lambda path: CocoPanoptic(path.parent, path.parent, path),
    lambda path: read_image(path), lambda path: plot_utils.read_log(path.parent, path.name)])
def test_a_pickle_in_place_of_another_file_is_only_a_broken_file(tmp_path, read):
    (tmp_path / "file").write_bytes(pickle.dumps(Trap(tmp_path / "executed"), protocol=0))
    with pytest.raises((InputError, UnreadableImage), match="file"):
        read(tmp_path / "file")
    assert not (tmp_path / "executed").exists()


# What could execute what it is given: modules not to import, functions not to call, and words that make a call safe.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "__import__",
                   "commands.getoutput", "subprocess.getoutput", "subprocess.getstatusoutput"}
NEEDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}


def dangers(source):
    """What a program could be made to execute, as (line, words)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, f"import {name}") for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS or given.get("shell"):
                yield node.lineno, name
            if name in NEEDED and given.get(NEEDED[name][0]) is not NEEDED[name][1]:
                yield node.lineno, f"{name} without {NEEDED[name][0]}={NEEDED[name][1]}"


def test_no_program_has_a_way_to_execute_what_it_reads(root):
    assert list(dangers("import pickle\ntorch.load(f)\nnp.load(f)\nsubprocess.run(x, shell=True)\neval(x)")) != []
    files = [path for path in root.rglob("*.py") if not {"tests", ".venv", "build"} & set(path.relative_to(root).parts)]
    assert len(files) > 50
    assert [(str(path), *danger) for path in files for danger in dangers(path.read_text())] == []
    # With its other guards. The benchmark reads what its own processes wrote a moment before.
    assert [path.name for path in files if "torch.load(" in path.read_text() and path.parent.name != "benchmark"] == [
        "checkpoint.py"]


# Paths.

OUTSIDE = ["../secret.png", "/etc/passwd", "a/../../secret.png", "..", "./../secret.png"]


@pytest.fixture
def folder(tmp_path):
    """A folder of images, and a file beside it that no data file may name."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a..b.png")
    return tmp_path


def annotations(name, **more):
    return {"images": [{"id": 7, "file_name": name, "width": 8, "height": 8}], "annotations": [],
            "categories": [{"id": 1, "name": "thing", "isthing": 1}], **more}


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_in_a_json_cannot_leave_the_image_folder(folder, name):
    path = folder / "instances.json"
    path.write_text(json.dumps(annotations(name)))
    with pytest.raises(InputError, match=r"^image id 7 of .*instances.json has the file_name '.*', which leads out of the "
                                         "image folder$"):
        CocoDetection(folder / "images", path)
    entry = {"image_id": 7, "file_name": name, "segments_info": []}
    path.write_text(json.dumps(annotations("a..b.png", annotations=[entry])))
    with pytest.raises(InputError, match="image id 7 with the file_name '.*', which leads out of the folder of the PNGs"):
        CocoPanoptic(folder / "images", folder, path)


def test_dots_within_the_folder_are_just_names(folder):
    for name in ("a..b.png", "x/../a..b.png"):
        (folder / "images" / "x").mkdir(exist_ok=True)
        (folder / "instances.json").write_text(json.dumps(annotations(name)))
        assert CocoDetection(folder / "images", folder / "instances.json")[0][0].shape == (3, 8, 8)


def test_names_in_image_lists_and_tables_cannot_leave_the_folder(folder):
    lists = folder / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("000001\n../../../secret\n")
    with pytest.raises(InputError, match="trainval.txt names '../../../secret', which leads out of the folder"):
        find_pictures(folder, "train")
    (folder / "ships.csv").write_text("ImageId,EncodedPixels\n../secret.png,1 3\n")
    with pytest.raises(InputError, match="ships.csv, line 2: '../secret.png' leads out of the image folder"):
        convert_airbus.read_ships(str(folder / "ships.csv"))


# Outputs.


def test_a_program_replaces_its_own_files_and_no_others(tmp_path):
    mine, other = tmp_path / "mine.png", tmp_path / "other.png"
    refuse_others("--output", [mine])
    mine.write_text("first")
    remember([mine])
    refuse_others("--output", [mine])
    mine.write_text("second")
    remember([mine])
    refuse_others("--output", [mine])
    other.write_text("somebody's")
    with pytest.raises(InputError, match="^--output: .*other.png exists and wasn't written by this program: choose another "
                                         "name, or delete it$"):
        refuse_others("--output", [mine, other])
    mine.write_text("edited by hand")
    with pytest.raises(InputError, match="mine.png exists and wasn't written"):
        refuse_others("--output", [mine])


# Damage: whatever bytes a file holds, it is read as it was or refused in a sentence.


def damaged(content, seed):
    """Bytes cut, changed or inserted at a random place."""
    rng = random.Random(seed)
    place, piece = rng.randrange(len(content)), rng.randbytes(rng.choice([1, 4, 100]))
    return rng.choice([content[:place], content[:place] + piece + content[place + len(piece):],
                       content[:place] + piece + content[place:]])


def test_a_damaged_part_of_a_proposal_cache_is_refused_in_a_sentence(tmp_path):
    cache = ProposalCache.create(tmp_path / "cache", 1)
    entries = {"a.jpg": Entry(10, np.ones((3, 6), np.uint8)), "b/ö.jpg": Entry(11, np.zeros((0, 6), np.uint8))}
    cache.write(0, entries)
    path = tmp_path / "cache" / "proposals-00000.npz"
    whole, refused = path.read_bytes(), 0
    for seed in range(150):
        path.write_bytes(damaged(whole, seed))
        try:
            assert {len(entry.regions.shape) for entry in cache.read(0).values()} <= {2}
        except InputError as error:
            refused += "\n" not in error.sentence
    assert refused > 100


def test_a_cache_whose_arrays_do_not_go_together_is_refused(tmp_path):
    cache = ProposalCache.create(tmp_path / "cache", 1)
    arrays = {"names": np.frombuffer(b"a\0", np.uint8), "file_sizes": np.array([5]), "ends": np.array([2]),
              "regions": np.zeros((2, 6), np.uint8)}
    for change in ({}, {"ends": np.array([3])}, {"ends": np.array([-1])}, {"regions": np.zeros((2, 4), np.uint8)},
                   {"regions": np.zeros((2, 6))}, {"file_sizes": np.array([5, 6])}, {"names": np.zeros(0, np.uint8)}):
        np.savez(tmp_path / "cache" / "proposals-00000.npz", **{**arrays, **change})
        if not change:
            assert list(cache.read(0)) == ["a"]
            continue
        with pytest.raises(InputError, match="of the proposal cache is damaged"):
            cache.read(0)
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_parts": 16', '"num_parts": 0'))
    with pytest.raises(InputError, match="num_parts is 0, not"):
        ProposalCache(tmp_path / "cache")


def test_a_damaged_checkpoint_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {"weight": torch.arange(20.0)}, "epoch": 3, "args": {"lr": 0.1, "sizes": [1, 2]}}, path)
    whole, refused = path.read_bytes(), 0
    for seed in range(150):
        path.write_bytes(damaged(whole, seed))
        try:
            load_checkpoint(str(path))
        except InputError as error:
            refused += "\n" not in error.sentence
    assert refused > 50  # changed numbers in a tensor are still numbers
