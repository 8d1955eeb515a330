"""A short run of the torture: `python -m tools.torture` is the long one."""
from commands import run


def test_a_few_faults_and_none_lost(tmp_path):
    done = run(["-m", "tools.torture", "--faults", "4", "--seed", "1", "--output_dir", tmp_path / "out"])
    assert done.stdout.splitlines()[-1] == "4 faults, none lost"
    assert "one process: the end after" in done.stdout and "two processes: the end after" in done.stdout
    assert done.stdout.count("weights the same and log.txt the same") == done.stdout.count("the end after")


def test_the_output_folder_must_be_new(tmp_path):
    done = run(["-m", "tools.torture", "--output_dir", tmp_path], check=False)
    assert done.returncode == 2 and done.stderr == f"error: --output_dir {tmp_path} exists already: name a new folder\n"
