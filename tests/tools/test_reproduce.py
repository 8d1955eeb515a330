"""The reproduction of the papers' tables: two rows of a few steps through the real program, broken off and continued."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.reproduce.claims import Claim, examine, gain, minus, own_gain
from tools.reproduce.halves import halve
from tools.reproduce.page import write_page
from tools.reproduce.presets import SMALL, load_preset
from tools.reproduce.results import Figures, mean_and_range
from tools.reproduce.rows import ROWS, Plan
from tools.reproduce.running import Cell, Runner, read_record
from util.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "world": "--image_size 64 --num_unlabelled 12 --num_train 8 --num_val 8 --max_objects 2",
    "backbone": "--steps 2 --num_images 64",
    "model": "--backbone resnet18 --backbone_last_layer layer3 --hidden_dim 32 --nheads 2 --dim_feedforward 64 --enc_layers 1 "
             "--dec_layers 2 --num_queries 8 --num_workers 0 --lr 1e-3",
    "updetr": "--patch_size 24 --min_patch 12 --max_patch 48 --pretrain_sizes 64 --pretrain_max_size 64 --batch_size 4",
    "finetune": "--train_sizes 64 --crop_resize 64 --crop_size 1000 1000 --val_size 64 --max_size 64 --batch_size 4 "
                "--lr_backbone 0",
    "num_patches": 4, "pretrain_epochs": 1, "schedules": {"short": 2}, "labels": [100, 50], "evaluations": 1}


def start(folder, preset, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--preset", str(preset), "--seeds", "1", "--rows", "scratch", "updetr", "--output_dir", str(folder), *flags]
    return subprocess.Popen([sys.executable, "-m", "tools.reproduce", *flags], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("preset") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def broken_off_twice(tmp_path_factory, preset):
    """A reproduction that is told to stop in one training, killed in another, and then runs to its end."""
    folder = tmp_path_factory.mktemp("runs") / "out"
    first = start(folder, preset)
    wait_until(lambda: (folder / "seed1/scratch/short/cell.json").exists())
    first.send_signal(signal.SIGTERM)
    stopped = first.communicate(timeout=120)
    assert first.returncode == 75, stopped
    kept = {path.parent: json.loads(path.read_text()) for path in folder.glob("*/**/cell.json")}
    second = start(folder, preset)
    wait_until(lambda: (folder / "seed1/updetr/pretrain/cell.json").exists())
    second.kill()  # what it has started runs on; the next start ends that and continues it
    second.communicate()
    third = start(folder, preset)
    output, errors = third.communicate(timeout=300)
    assert third.returncode == 0, output + errors
    return folder, stopped, kept, output


def test_a_broken_off_reproduction_goes_on_and_keeps_what_was_finished(broken_off_twice):
    folder, stopped, kept, output = broken_off_twice
    assert stopped[1].splitlines()[-1] == "stopped by SIGTERM; the same command goes on from here"
    finished = {path for path, record in kept.items() if record["finished"]}
    assert finished and "cells were finished before" in output and "; 0 of" not in output
    for path, record in kept.items():
        now = read_record(path)
        assert now["finished"] and now["command"] == record["command"]
        assert now["seconds"] == record["seconds"] if path in finished else now["seconds"] > record["seconds"]


def test_every_training_ran_to_its_end(broken_off_twice):
    folder = broken_off_twice[0]
    for run, epochs in (("scratch/short", 2), ("updetr/pretrain", 1), ("updetr/short", 2), ("updetr/labels_50", 4)):
        lines = [json.loads(line) for line in (folder / "seed1" / run / "log.txt").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == list(range(epochs))
        assert [path.name for path in (folder / "seed1" / run).glob("*.pth")] == ["checkpoint.pth"]


def test_the_results_are_those_of_the_logs(broken_off_twice):
    folder = broken_off_twice[0]
    results = json.loads((folder / "results.json").read_text())
    assert results["reporting_images"] == 4, "half of the eight validation images"
    last = json.loads((folder / "seed1/updetr/short/log.txt").read_text().splitlines()[-1])
    assert results["cells"]["seed1/updetr/short"]["curve"][-1] == [2, *(100 * v for v in last["test_coco_eval_bbox"][:3])]
    both = [results["cells"][f"seed1/updetr/{run}"]["seconds"] for run in ("pretrain", "short")]
    alone = results["cells"]["seed1/scratch/short"]["seconds"]
    as_long = results["cells"]["seed1/scratch/short_as_long_as_updetr"]
    assert as_long["epochs"] == pytest.approx(max(1, 2 * sum(both) / alone), abs=0.6)  # seconds are shown rounded


def test_the_page_shows_each_row_and_its_pictures(broken_off_twice):
    folder = broken_off_twice[0]
    page = (folder / "reproduction.md").read_text()
    assert "| DETR, scratch |" in page and "| UP-DETR, M > 1 |" in page and "DETReg on DETR |" not in page
    for line in page.splitlines():
        if line.startswith("!["):
            assert (folder / line[line.index("](") + 2:-1]).stat().st_size > 1000
    assert page.count("![") == 4, "curves, the pretext's loss, two pictures of patches"
    assert str(folder) not in page + (folder / "results.json").read_text()


def test_a_finished_reproduction_has_nothing_to_run(broken_off_twice, preset):
    again = start(broken_off_twice[0], preset)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "9 of 9 cells were finished before" in output and "] seed1" not in output


def test_a_report_is_of_what_is_finished(broken_off_twice, preset, tmp_path):
    """Beside what is not: two seeds were asked for, one was run."""
    folder, page = broken_off_twice[0], tmp_path / "page.md"
    report = start(folder, preset, "--seeds", "2", "--report", "--page", str(page))
    output, errors = report.communicate(timeout=120)
    assert report.returncode == 0, errors
    assert "9 of 15 cells were finished before" in output and not (folder / "seed2").exists()
    assert page.read_text().count("| UP-DETR, M > 1 |") == 2, "in the table of equal epochs and in that of few labels"
    nothing = start(tmp_path / "empty", preset, "--report")
    assert nothing.wait(60) == 2 and "no training is finished" in nothing.stderr.read()


def test_results_of_different_settings_are_not_mixed(broken_off_twice, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**TINY, "num_patches": 2}))
    refused = start(broken_off_twice[0], other)
    errors = refused.communicate(timeout=60)[1]
    assert refused.returncode == 2 and "has results with another num_patches" in errors


def test_a_folder_of_someone_else_is_left_alone(tmp_path, preset):
    (tmp_path / "thesis.txt").write_text("")
    refused = start(tmp_path, preset)
    assert refused.wait(60) == 2 and "other files in it" in refused.stderr.read()


def test_a_cell_that_fails_is_named_and_the_others_are_run(tmp_path):
    def cell(name, code, needs=()):
        return Cell(name, "kind", lambda _: ["-c", code], needs)

    cells = [cell("a", "print('no such file'); raise SystemExit(2)"), cell("b", "pass", ("a",)), cell("c", "pass")]
    runner = Runner(cells, tmp_path, jobs=2, threads=1)
    sentence = r"1 of 3 cells failed, 2 are not finished; the first to fail was a: no such file \(status 2"
    with pytest.raises(InputError, match=sentence):
        runner.run()
    assert set(runner.seconds) == {"c"} and not (tmp_path / "b").exists()
    with pytest.raises(InputError, match=sentence):  # it is tried anew, and what was finished is not
        Runner(cells, tmp_path, jobs=2, threads=1).run()
    assert (tmp_path / "a" / "output.txt").read_text() == 2 * "no such file\n"


@pytest.mark.parametrize("text", ["[1]", "{", '{"base": "huge"}', '{"colour": 1}'])
def test_a_file_that_is_no_preset_is_refused(tmp_path, text):
    path = tmp_path / "preset.json"
    path.write_text(text)
    with pytest.raises(InputError, match="--preset .* is not a preset"):
        load_preset(str(path))


def test_the_plan_needs_nothing_that_comes_later():
    cells = Plan(SMALL, "out", list(ROWS), (1, 2)).cells()
    known = set()
    for cell in cells:
        assert set(cell.needs) <= known and cell.name not in known
        known.add(cell.name)


def test_rows_differ_in_what_their_names_say_only():
    cells = {cell.name: cell for cell in Plan(SMALL, "out", list(ROWS), (1,)).cells()}
    seconds = dict.fromkeys(cells, 1.0)

    def words(name):
        command = cells[name].command(seconds)
        return {word for word in command if "out/" not in word}

    base = words("seed1/updetr/pretrain")
    for row, more, fewer in (("no_reconstruction", set(), {"--feature_recon"}), ("unfrozen_cnn", set(), {"--fre_cnn"}),
                             ("no_attention_mask", {"--no_attention_mask"}, set()),
                             ("query_shuffle", {"--query_shuffle"}, set()),
                             ("within_group", {"--match_within_group"}, set()), ("1patch", set(), set())):
        other = words(f"seed1/updetr_{row}/pretrain")
        patches = {"1", str(SMALL.num_patches)}
        assert (other - base - patches, base - other - patches) == (more, fewer), row
    assert words("seed1/updetr/short") - words("seed1/scratch/short") == {"--pretrain"}


def test_halves_share_no_image_and_lose_none():
    images = [{"id": number} for number in (5, 1, 9, 3, 7)]
    annotations = [{"id": 10 * number + k, "image_id": number} for number in (1, 3, 5, 7, 9) for k in range(2)]
    first, second = halve({"images": images, "annotations": annotations, "categories": ["kept"]})
    assert [image["id"] for image in first["images"]] == [1, 5, 9]
    assert [image["id"] for image in second["images"]] == [3, 7]
    assert {found["image_id"] for found in first["annotations"]} == {1, 5, 9} and len(second["annotations"]) == 4
    assert first["categories"] == second["categories"] == ["kept"]


def made_up():
    """Two seeds; UP-DETR gains 4 and 2 over scratch, and finds patches in one of them."""
    def finetuned(ap):
        return {"seconds": 10, "epochs": 2, "loss": [3.0, 2.0], "command": ["x"],
                "curve": [[1, 0.0, 0.0, 0.0], [2, ap, 2 * ap, ap / 2]]}

    def pretrained(iou):
        return {"seconds": 30, "epochs": 1, "loss": [1.0], "curve": [], "pretext": [iou, 0.25], "command": ["x"]}

    return {"seeds": [1, 2], "cells": {
        "seed1/scratch/short": finetuned(10.0), "seed2/scratch/short": finetuned(11.0),
        "seed1/updetr/short": finetuned(14.0), "seed2/updetr/short": finetuned(13.0),
        "seed1/updetr/pretrain": pretrained(0.5), "seed2/updetr/pretrain": pretrained(0.15)}}


def test_claims_are_examined_seed_by_seed():
    short, long = gain("updetr", "scratch", "short"), gain("updetr", "scratch", "long")
    claims = [Claim("a", "", short), Claim("b", "", own_gain("pretext", "control", "updetr")),
              Claim("c", "", minus(short, long)), Claim("d", "", gain("scratch", "updetr", "short", "AP75"))]
    a, b, d = examine(Figures(made_up()), claims)
    assert a.values == [4.0, 2.0] and a.mean == 3.0 and a.verdict == "in every seed"
    assert b.values == pytest.approx([0.25, -0.10]) and b.verdict == "on average"
    assert d.values == [-2.0, -1.0] and d.verdict == "no"
    assert d.claim.text == "d", "c has no long schedule to speak of"


def test_means_and_ranges():
    assert mean_and_range([1.0, 2.0, 4.5]) == "2.5 (1.0 … 4.5)"
    assert mean_and_range([0.25], 3) == "0.250" and mean_and_range([]) == "–"


def test_the_page_tells_what_else_was_tried():
    preset = {**SMALL.__dict__, "schedules": {"short": 2}, "labels": [100]}
    machine = {"cpu": "a processor", "device": "cpu", "cpus": 2, "torch": "2.9", "python": "3.11", "date": "2030-01-01"}
    results = {**made_up(), "command": "c", "preset": preset, "jobs": 2, "threads": 1, "reporting_images": 7,
               "machine": machine}
    other = {**results, "preset": {**preset, "num_patches": 16, "pretrain_epochs": 9}, "half": "choose"}
    page = write_page(results, {}, [other])
    assert ("| `num_patches 16`, `pretrain_epochs 9` | UP-DETR, M > 1 | 2 | choose | 13.5 (13.0 … 14.0) | 27.0 (26.0 … 28.0) "
            "| 0.325 (0.150 … 0.500) | 0.250 (0.250 … 0.250) | 30 (30 … 30) |") in page
    assert "What else was tried" not in write_page(results, {})


def test_the_page_has_the_numbers_of_its_results():
    machine = {"cpu": "a processor", "device": "cpu", "cpus": 2, "torch": "2.9", "python": "3.11", "date": "2030-01-01"}
    preset = {**SMALL.__dict__, "schedules": {"short": 2}, "labels": [100]}
    page = write_page({**made_up(), "command": "python -m tools.reproduce", "preset": preset, "jobs": 2, "threads": 1,
                       "reporting_images": 7, "machine": machine}, {})
    assert ("| UP-DETR, M > 1 | 13.5 (13.0 … 14.0) | 27.0 (26.0 … 28.0) | 6.8 (6.5 … 7.0) | 0.325 (0.150 … 0.500) "
            "| 0.250 (0.250 … 0.250) | 30 (30 … 30) | 10 (10 … 10) |") in page
    assert "+3.0 AP | +4.0, +2.0 | in every seed |" in page
    assert "+0.075 IoU | +0.250, -0.100 | on average (1 of 2 seeds) |" in page
