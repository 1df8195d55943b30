"""Start a real ``llmtrain train --multirun`` as a process of its own, watch it, and kill it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.sweep.rows import read_rows
from tests.end_to_end.commands import REPOSITORY

TIME_LIMIT_S = 700


class Sweep:
    """One command of a sweep."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain", "train", "--multirun", *words],
                cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """Everything it has printed."""
        return self.log.read_text()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` holds, which it must before the command ends."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended too early:\n{self.output}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End it without a word."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        """Its exit status."""
        try:
            return self.process.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {TIME_LIMIT_S} s:\n{self.output}") from None


def states(sweep: Path) -> dict[str, str]:
    """State of every trial by the name of its folder."""
    return {row["folder"]: row["state"] for row in read_rows(sweep / "trials.jsonl")}


def values(sweep: Path) -> list[Any]:
    """Overrides and objective of every trial, in order."""
    last = {row["number"]: row for row in read_rows(sweep / "trials.jsonl")}
    return [(last[n]["overrides"], last[n]["state"], last[n]["value"]) for n in sorted(last)]
