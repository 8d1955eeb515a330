"""Others to compare with, each in a process of its own: Hugging Face, torchvision's transforms, other checkouts."""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import MappingProxyType
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch

from tools.benchmark.contender import CONTENDERS
from tools.benchmark.rounds import Rounds
from util.errors import InputError

CONTENDER = Path(__file__).with_name("contender.py")
HUGGING_FACE, TORCHVISION = "hf", "torchvision"
# Those that aren't checkouts: where their contenders are.
OTHERS = {HUGGING_FACE: "tools.benchmark.hugging_face", TORCHVISION: "tools.benchmark.torchvision_samples"}


class Peer:
    """A `contender` in its own process.

    Args:
        name: as the user wrote it in `--against`.
        spec: what to do, see `contender`.
        log: file for what it prints.

    Raises:
        InputError: if it can't do that.
    """

    def __init__(self, name: str, spec: Dict[str, Any], log: Path) -> None:
        self.name, self.outputs, self.log = name, spec["outputs"], log
        root = Path(name).resolve() if spec["kind"] == "checkout" else Path(__file__).resolve().parents[2]
        with open(log, "w") as file:
            self.process = subprocess.Popen([sys.executable, str(CONTENDER)], cwd=root, stderr=file, text=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ready = self._ask({**spec, "root": str(root)})

    def turn(self) -> float:
        """One unit of work; returns the seconds it took."""
        return self._ask({})["seconds"]

    def _ask(self, command: Dict[str, Any]) -> Dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said last tells why
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            self.close()
            raise InputError(f"--against {self.name} failed: {' '.join(answer['error'].split())}")
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text().strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self.process.wait()}"

    def compared_with(self, checked: Dict[str, Any]) -> Dict[str, Any]:
        """How its results differ from ours, where both have any."""
        found = torch.load(self.outputs, weights_only=True)
        result = {"comparable": self.ready["comparable"]}
        result.update({"loss": found.pop("loss")} if "loss" in found else {})
        if self.ready["ignored"]:
            result["unknown_flags"] = self.ready["ignored"]
        return {**result, **{f"largest_difference_of_{name}": float((value - checked[name]).abs().max())
                             for name, value in found.items()}}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def contest(work: str, spec: Dict[str, Any], args: argparse.Namespace, images: int,
            others: Mapping[str, Dict[str, Any]] = MappingProxyType({})) -> Tuple[Any, Dict[str, Any]]:
    """Time a kind of work, ours and that of `args.against` in turn.

    Args:
        work: one of `contender.CONTENDERS`.
        spec: for ours, see `contender`. Checkouts get the same, and our weights if the work has a model.
        args: the benchmark's flags.
        images: how many one turn works through.
        others: by name, what those of `OTHERS` that can do it are told besides the spec.

    Returns:
        our contender, and `ours`, `against` as of `Rounds.results` with what could be compared besides the time.
    """
    ours = CONTENDERS[work](spec)
    checked = ours.check()
    peers: List[Peer] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, name in enumerate(args.against):
                if name not in OTHERS or name in others:
                    peers.append(_peer(name, work, spec, ours, others.get(name), Path(folder) / str(number)))
            rounds = Rounds(args.seconds, ours.device, {peer.name: peer.turn for peer in peers})
            ours.run(rounds)
            result = rounds.results(images)
            for peer in peers:
                result["against"][peer.name].update(peer.compared_with(checked))
        finally:
            for peer in peers:
                peer.close()
    result["against"].update({name: {"note": f"{name} has no such thing"} for name in args.against
                              if name in OTHERS and name not in others})
    return ours, {**({"loss": checked["loss"]} if "loss" in checked else {}), **result}


def _peer(name: str, work: str, spec: Dict[str, Any], ours: Any, told: Optional[Dict[str, Any]],
          folder: Path) -> Peer:
    """Start one of the others, with what it needs as files in a new folder."""
    folder.mkdir()
    mine = {**spec, "kind": "checkout", "work": work, "threads": torch.get_num_threads(),
            "outputs": str(folder / "outputs.pt")}
    if "data" in spec:
        mine["data"] = str(folder / "data.pt")
        torch.save(spec["data"], mine["data"])
    if name in OTHERS:
        mine.update(kind=OTHERS[name], **told)
    elif "weights" in spec:
        mine["weights"] = str(folder / "weights.pt")
        torch.save(ours.model.state_dict(), mine["weights"])
    return Peer(name, mine, folder / "log.txt")
