"""torchrun over two nodes: two agents on this machine that meet at a port, with one process each."""
import os
import subprocess
import sys

import pytest
import torch

from commands import ROOT, SMALL_COCO, free_port, log_lines, run, weights
from datasets.toy import ToySettings, write_toy


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    write_toy(folder, ToySettings(image_size=96, num_unlabelled=1, num_train=8, num_val=3))
    return ["main.py", *SMALL_COCO, "--coco_path", str(folder / "coco"), "--load_backbone", "none", "--epochs", "2",
            "--device", "cpu"]


@pytest.fixture(scope="module")
def one_node(training, tmp_path_factory):
    """What one node with two processes ends with."""
    out = tmp_path_factory.mktemp("one_node")
    run([*training, "--output_dir", out], "torchrun")
    return result(out)


def result(folder):
    return weights(folder), log_lines(folder)


@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_two_nodes_train_as_one_does(training, one_node, tmp_path, rendezvous):
    port = free_port()
    meet = {"c10d": ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job"],
            "static": ["--master-addr=127.0.0.1", f"--master-port={port}"]}[rendezvous]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    agents = []
    try:
        for node in range(2):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meet,
                       *([f"--node-rank={node}"] if rendezvous == "static" else []),
                       *training, "--output_dir", str(tmp_path / "out")]
            agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                           stderr=subprocess.STDOUT))
        outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(output[-3000:] for output in outputs)
    # Only process 0 speaks, on whichever node it is.
    assert sorted(output.count("distributed: 2 processes, gloo, env://") for output in outputs) == [0, 1]
    assert sorted(output.count("effective batch size: 4 (2 processes x 2 images") for output in outputs) == [0, 1]
    model, log = result(tmp_path / "out")
    assert log == one_node[1]
    assert all(torch.equal(model[name], one_node[0][name]) for name in model)
