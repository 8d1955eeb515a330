"""The cache of proposals: it says what selective search says, keeps images apart, and is refused if it isn't theirs."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset
from datasets.proposal_cache import CachedProposals, Entry, ProposalCache
from datasets.selective_search import propose_regions
from region_scenes import arguments, write_scene
from tools import cache_proposals
from util.errors import InputError

FILES = ["n0/a.png", "n0/b.png", "n1/a.png", "n1/b.png"]   # each name twice


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(FILES):
        write_scene(tmp_path / "images" / name, seed=number)
    return tmp_path / "images"


@pytest.fixture
def fill(folder, tmp_path, capfd):
    """Runs the tool; returns what it printed."""
    def run(*flags):
        parsed = cache_proposals.get_args_parser().parse_args(
            ["--imagenet_path", str(folder), "--cache_path", str(tmp_path / "cache"), "--num_workers", "0", *flags])
        cache_proposals.main(parsed)
        return "".join(capfd.readouterr())
    return run


def all_entries(cache_path):
    cache = ProposalCache(cache_path)
    return {name: entry for part in range(cache.num_parts) for name, entry in cache.read(part).items()}


def test_training_on_the_cache_is_training_without_it(folder, tmp_path, fill):
    printed = fill()
    assert "regions on average of 4 images; 4 were new, 0 could not be read" in printed
    for strategy, max_prop in (("topk", 3), ("topk", 1), ("random", 3)):
        for image_set in ("train", "val"):
            args = arguments(folder, strategy=strategy, max_prop=max_prop)
            plain = build_dataset(image_set, args)
            args.cache_path = str(tmp_path / "cache")
            cached = build_dataset(image_set, args)
            for one, two in ((plain[index], cached[index]) for index in range(4)):
                assert torch.equal(one[0], two[0]) and all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_training_on_a_cache_needs_no_opencv(folder, tmp_path, fill, monkeypatch):
    fill()
    monkeypatch.setattr("datasets.regions.require_opencv", lambda: pytest.fail("asked for OpenCV"))
    assert len(build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))[0][1]["boxes"])


def test_images_of_one_name_have_entries_of_their_own(folder, tmp_path, fill):
    fill()
    entries = all_entries(tmp_path / "cache")
    assert sorted(entries) == FILES
    for name in FILES:
        assert np.array_equal(entries[name].regions, propose_regions(folder / name))
    assert not np.array_equal(entries["n0/a.png"].regions, entries["n1/a.png"].regions)
    cached = CachedProposals(tmp_path / "cache", folder, ["n1/a.png", "n0/a.png"])
    assert np.array_equal(cached(0, folder / "n1/a.png", None), entries["n1/a.png"].regions)
    assert np.array_equal(cached(1, folder / "n0/a.png", None), entries["n0/a.png"].regions)


def test_the_tree_may_move(folder, tmp_path, fill):
    fill()
    folder.rename(tmp_path / "elsewhere")
    build_dataset("train", arguments(tmp_path / "elsewhere", cache_path=str(tmp_path / "cache")))[3]


def test_paths_of_any_kind_and_empty_parts(tmp_path):
    cache = ProposalCache.create(tmp_path / "cache", 5000)
    assert cache.num_parts == 79 and cache.read(7) == {}
    entries = {"ä/ 1\n2.jpg": Entry(5, np.array([[0, 0, 128, 128, 1, 12]], dtype=np.uint8)),
               "x.jpg": Entry(2**40, np.zeros((0, 6), dtype=np.uint8))}
    cache.write(7, entries)
    again = cache.read(7)
    assert list(again) == list(entries)
    for name, entry in entries.items():
        assert again[name].file_size == entry.file_size and np.array_equal(again[name].regions, entry.regions)
    positions = cache.parts_of(["b", "a", "b"])
    assert sum(map(len, positions.values())) == 3 and any({0, 2} <= set(mine) for mine in positions.values())


def test_a_changed_image_is_refused_and_then_done_again(folder, tmp_path, fill):
    fill()
    before = all_entries(tmp_path / "cache")["n0/b.png"].regions
    write_scene(folder / "n0/b.png", size=(80, 80), seed=9)
    args = arguments(folder, cache_path=str(tmp_path / "cache"))
    dataset = build_dataset("train", args)
    dataset[0]
    with pytest.raises(InputError, match="is stale: .*n0/b.png has changed since its regions were proposed; run"):
        dataset[1]
    assert "4 images; 1 were new" in fill()
    assert not np.array_equal(all_entries(tmp_path / "cache")["n0/b.png"].regions, before)
    build_dataset("train", args)[1]


def test_images_that_the_cache_lacks_are_named_before_training(folder, tmp_path, fill):
    classes = tmp_path / "classes.txt"
    classes.write_text("n1\n")
    assert "of 2 images; 2 were new" in fill("--class_list", str(classes))
    args = arguments(folder, cache_path=str(tmp_path / "cache"), class_list=str(classes))
    assert len(build_dataset("train", args)) == 2
    args.class_list = None
    with pytest.raises(InputError, match="lacks 2 of the 4 images of .*, the first is n0/a.png: run python -m tools"):
        build_dataset("train", args)
    assert "of 4 images; 2 were new" in fill() and len(build_dataset("train", args)) == 4


@pytest.mark.parametrize("change, words", [
    (lambda manifest: manifest["proposals"].update(grid=256), "grid 256 instead of 128"),
    (lambda manifest: manifest["proposals"].update(mode="quality"), "mode quality instead of fast"),
    (lambda manifest: (manifest.update(format=1), manifest["proposals"].update(order_seed=1)),
     "format 1 instead of 2, order_seed 1 instead of None"),
    (lambda manifest: manifest.pop("proposals"), "method None instead of selective search")])
def test_a_cache_of_other_proposals_is_refused(folder, tmp_path, fill, change, words):
    fill()
    path = tmp_path / "cache/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    message = f"^--cache_path .*cache holds other proposals than these \\({words}.*\\): give another folder, or delete"
    with pytest.raises(InputError, match=message):
        build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))
    with pytest.raises(InputError, match=message):
        fill()


@pytest.mark.parametrize("content", [{}, {"num_parts": 0}, {"num_parts": "many"}])
def test_a_damaged_manifest_is_refused(folder, tmp_path, fill, content):
    fill()
    path = tmp_path / "cache/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["num_parts"]
    path.write_text(json.dumps({**manifest, **content}))
    with pytest.raises(InputError, match="manifest.json is damaged: its num_parts is (None|0|many), not a number"):
        ProposalCache(tmp_path / "cache")


def test_what_is_no_cache_is_refused(folder, tmp_path, fill):
    with pytest.raises(InputError, match="holds no proposals: it has no manifest.json"):
        build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/thesis.tex").touch()
    with pytest.raises(InputError, match="has files in it, but no proposals: give an empty or a new folder"):
        fill()
    (tmp_path / "cache/thesis.tex").unlink()
    fill()


def test_a_damaged_part_is_named(folder, tmp_path, fill):
    fill()
    part = next((tmp_path / "cache").glob("proposals-*.npz"))
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.raises(InputError, match=f"{part.name} of the proposal cache is damaged .*: delete it, then run"):
        build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))
    part.unlink()
    assert " 0 were new" not in fill()
    build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))


def test_unreadable_images_are_passed_over_and_tried_again(folder, tmp_path, fill):
    good = (folder / "n0/a.png").read_bytes()
    (folder / "n0/a.png").write_bytes(b"broken" + good[6:])
    printed = fill()
    assert "passed over: image file" in printed and "3 were new, 1 could not be read" in printed
    dataset = build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))
    assert dataset[0][1]["image_id"].tolist() == [1] and dataset.unreadable == ["n0/a.png"]
    (folder / "n0/a.png").write_bytes(good)   # of the same size
    assert "of 4 images; 1 were new, 0 could not be read" in fill()
    dataset = build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))
    assert dataset[0][1]["image_id"].tolist() == [0]


def test_an_image_without_structure_is_cached_too(folder, tmp_path, fill):
    Image.new("RGB", (30, 30)).save(folder / "flat.png")
    fill()
    assert " 0 were new" in fill()
    dataset = build_dataset("train", arguments(folder, cache_path=str(tmp_path / "cache")))
    assert dataset[0][1]["image_id"].tolist() == [1] and dataset.unsuited == ["flat.png"]
