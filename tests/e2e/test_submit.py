"""What run_with_submitit.py asks of Slurm and what it refuses before a job has waited in the queue."""
import argparse
import shlex
import subprocess
import sys

import pytest

import run_with_submitit
from commands import ROOT, run
from run_with_submitit import Run, job_options, split_args
from util.errors import InputError


def parse(*flags):
    return run_with_submitit.get_args_parser().parse_args([str(flag) for flag in flags])


def test_detrs_flags_and_defaults():
    args = parse()
    assert (args.ngpus, args.nodes, args.timeout, args.job_dir) == (8, 2, 60, "")
    assert args.clip_max_norm == 0.1 and args.epochs is None, "main.py's flags are there too"


def test_a_job_on_gpus():
    args = parse("--ngpus", 4, "--nodes", 3, "--timeout", 90, "--partition", "p", "--account", "a", "--constraint", "volta",
                 "--comment", "c", "--mem_gb", 100, "--sbatch", "qos=high", "--exclusive".lstrip("-"))
    options = job_options(args)
    wanted = {"nodes": 3, "ntasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 10, "mem": "100GB", "time": 90,
              "partition": "p", "account": "a", "constraint": "volta", "comment": "c", "job_name": "detr"}
    assert {name: options[name] for name in wanted} == wanted
    assert options["additional_parameters"] == {"requeue": True, "qos": "high", "exclusive": True}


def test_a_job_on_cpus_asks_for_no_gpus():
    options = job_options(parse("--ngpus", 0, "--tasks_per_node", 6))
    assert (options["ntasks_per_node"], options["cpus_per_task"]) == (6, 1)
    assert not {"gpus_per_node", "mem", "partition", "account", "constraint", "comment"} & set(options)
    assert job_options(parse("--ngpus", 0, "--cpus_per_task", 3))["cpus_per_task"] == 3


def test_submitit_makes_a_script_of_it(tmp_path):
    slurm = pytest.importorskip("submitit.slurm.slurm")
    options = job_options(parse("--ngpus", 2, "--comment", "two words", "--sbatch", "qos=high"))
    script = slurm._make_sbatch_string(command="COMMAND", folder=tmp_path / "%j", **options)
    for line in ("--gpus-per-node=2", "--ntasks-per-node=2", "--nodes=2", "--time=60", "--qos=high", "--requeue",
                 "--comment='two words'", "--signal=USR2@90", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in script
    assert f"export PYTHONPATH={shlex.quote(str(ROOT))}" in script and "--kill-on-bad-exit=1 COMMAND" in script


def test_the_trainings_part_of_the_flags(tmp_path):
    run_args = split_args(parse("--coco_path", "x", "--job_dir", tmp_path / "%j", "--epochs", 3, "--comment", "c"))
    assert run_args.output_dir == str(tmp_path / "%j") and run_args.device == "cuda" and run_args.epochs == 3
    assert not hasattr(run_args, "comment") and run_args.lr_backbone is None, "resolved where the job runs"
    run_args = split_args(parse("--coco_path", "x", "--job_dir", "jobs", "--output_dir", tmp_path / "out", "--ngpus", 0))
    assert run_args.output_dir == str(tmp_path / "out") and run_args.device == "cpu"


@pytest.mark.parametrize("flags, message", [
    (["--ngpus", -1], "--ngpus -1 must be at least 0"), (["--tasks_per_node", 0], "--tasks_per_node 0 must be at least 1"),
    (["--timeout", 0], "--timeout 0 must be at least 1"),
    (["--tasks_per_node", 3], "--tasks_per_node 3 contradicts --ngpus 8"),
    (["--device", "cpu"], "--device cpu contradicts --ngpus 8"),
    (["--ngpus", 0, "--device", "cuda"], "--device cuda contradicts --ngpus 0"),
    (["--output_dir", ""], "--output_dir is missing"),
    (["--coco_path", ""], "--coco_path is missing"),
    (["--num_patches", 5], "--num_patches has no effect with --dataset_file coco"),
    (["--nheads", 7], "--hidden_dim 256 must be a multiple of 4 and of --nheads 7")])
def test_mistakes_are_told_at_submission(flags, message):
    with pytest.raises(InputError, match=f"^{message}"):
        split_args(parse("--coco_path", "x", "--output_dir", "out", *flags))


def test_an_entry_of_sbatch_needs_a_name():
    with pytest.raises(InputError, match="^--sbatch =high is not NAME=VALUE$"):
        job_options(parse("--sbatch", "=high"))


def test_a_used_folder_must_be_meant(tmp_path):
    """After a requeue a checkpoint in the folder is taken for the job's own."""
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    flags = ["--coco_path", "x", "--output_dir", tmp_path]
    for given in ([], ["--resume", "other.pth"], ["--pretrain", "other.pth"]):
        with pytest.raises(InputError, match="checkpoint.pth is of an earlier run: pass --resume auto to continue it"):
            split_args(parse(*flags, *given))
    for given in (["--resume", "auto"], ["--resume", tmp_path / "checkpoint.pth"], ["--eval", "--resume", "other.pth"]):
        split_args(parse(*flags, *given))


@pytest.mark.parametrize("given, saved, means", [
    ({}, False, "auto"), ({}, True, "auto"), ({"resume": "start.pth"}, False, "start.pth"),
    ({"resume": "start.pth"}, True, "auto"), ({"resume": "it.pth", "eval": True}, True, "it.pth")])
def test_where_a_job_starts_and_goes_on(given, saved, means, tmp_path, monkeypatch):
    """A checkpoint that the job has written wins over where it was told to start."""
    seen = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(run_with_submitit, "_shield_children", lambda: None)
    monkeypatch.setattr(run_with_submitit.main, "main", lambda args, reactions: seen.append(args))
    (tmp_path / "17").mkdir()
    if saved:
        (tmp_path / "17" / "checkpoint.pth").write_bytes(b"")
    stored = argparse.Namespace(**{"output_dir": str(tmp_path / "%j"), "resume": "", "eval": False, **given})
    Run(stored)()
    assert (seen[0].resume, seen[0].output_dir) == (means, str(tmp_path / "17"))
    assert stored.output_dir == str(tmp_path / "%j"), "what is stored for a requeue stays as it was given"


def test_without_slurm_or_submitit(tmp_path):
    flags = ["run_with_submitit.py", "--coco_path", "x", "--output_dir", tmp_path / "out", "--ngpus", "0"]
    pytest.importorskip("submitit")
    done = run(flags, check=False, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and 'error: the job was not submitted: Could not detect "srun"' in done.stderr
    script = "import sys, runpy; sys.modules['submitit'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], " \
             "run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script, *map(str, flags)], cwd=ROOT, text=True, capture_output=True,
                          timeout=60)
    assert done.returncode == 2 and "pip install -r requirements/cluster.txt" in done.stderr.splitlines()[-1]
