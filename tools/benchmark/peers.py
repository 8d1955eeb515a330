"""Others to compare with, each in a process of its own: Hugging Face's models, or another checkout."""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

from util.errors import InputError

CONTENDER = Path(__file__).with_name("contender.py")
HUGGING_FACE = "hf"
WITH_HUGGING_FACE = ("detr_finetune", "deformable_finetune", "detr_inference", "deformable_inference")


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

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
