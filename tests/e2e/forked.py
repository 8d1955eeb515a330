"""Programs of the project run in forks of a process that has loaded their libraries.

A Python that loads torch and torchvision takes four seconds to start, most of what a small run takes; a fork starts at
once. It is a process like any other: with a command line, an environment, an output and an exit status of its own.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from typing import Dict, List

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.distributed", "torchvision.transforms.v2", "scipy.optimize", "faster_coco_eval", "cv2"])


def run(words: List[str], folder: str, environments: List[Dict[str, str]], timeout: float) -> subprocess.CompletedProcess:
    """Run `python WORDS` in a folder, once in each environment and at the same time, as `subprocess.run` would.

    The environments must have OMP_NUM_THREADS.

    Returns:
        The worst exit status, and what all of them wrote.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds; they are then ended.
    """
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        processes = [_CONTEXT.Process(target=_become, args=(words, folder, environment, out.name, err.name))
                     for environment in environments]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            if any(process.exitcode is None for process in processes):
                raise subprocess.TimeoutExpired(words, timeout, out.read(), err.read())
        finally:
            for process in processes:
                process.kill()
        status = max((process.exitcode for process in processes), key=abs)
        return subprocess.CompletedProcess(words, status, out.read(), err.read())


def _become(words: List[str], folder: str, environment: Dict[str, str], out: str, err: str) -> None:
    for name, number in ((os.devnull, 0), (out, 1), (err, 2)):
        opened = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # which torch has read before
    module = words[0] == "-m"
    sys.argv = words[module:]
    place = folder if module else os.path.dirname(os.path.abspath(words[0]))
    sys.path[:0] = [place, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
