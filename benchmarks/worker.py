"""A process of one side of a comparison, asked in lines of JSON and answering in such lines.

worker = Worker("litgpt", [python, "peers/train_litgpt.py"], Path("log.txt"), OMP_NUM_THREADS=1)
answer = worker.ask({"steps": 1})
worker.close()
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A worker failed; the text is its traceback, or how it ended."""


class Worker:
    """One process; it answers one request at a time."""

    def __init__(self, name: str, command: Sequence[str], log: Path, **environment: object) -> None:
        """Start it with ``environment`` besides its own; ``log`` gets what it says."""
        self.name = name
        self._log = log.open("ab")
        settings = [f"{key}={value}" for key, value in environment.items()]
        self._process = subprocess.Popen(
            ["env", *settings, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request."""
        if self._process.stdin is None:
            raise WorkerError(f"{self.name} was started without a pipe")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the answer to the oldest request; raises WorkerError where it failed."""
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self.name} ended with status {status}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.send(request)
        return self.receive()

    def close(self) -> None:
        """Let it end; kill it where it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
