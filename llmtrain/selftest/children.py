"""Runs that a self-test starts, watches and kills: ``llmtrain launch`` and all below it.

child = Child(["name=one", "training.num_tokens=1e5", ...], Path("one.log"))
child.finish()              # or: child.kill_when(lambda: ...)
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from llmtrain.errors import CheckpointError

_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.002
_SHOWN_LINES = 15


class Child:
    """One training run of its own."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        """Start it; what it prints goes to ``log``."""
        self._log = log
        options = [word for word in words if word.startswith("--")]
        overrides = [word for word in words if not word.startswith("--")]
        with log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain", "launch", *options, "target=local", *overrides],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            CheckpointError: it did not end as a run should; holds what it said last.
        """
        try:
            code = self._process.wait()
        except BaseException:
            self._kill()
            raise
        if code:
            raise CheckpointError(f"a run of the test ended with status {code}: {self._said()}")

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Kill it and everything below it with SIGKILL once ``condition`` holds.

        Raises:
            CheckpointError: it ended before.
        """
        try:
            while not condition():
                if self._process.poll() is not None:
                    raise CheckpointError(
                        "the run to be killed ended before it had saved, with status "
                        f"{self._process.returncode}: {self._said()}"
                    )
                time.sleep(_LOOK_S)
        finally:
            self._kill()

    def _kill(self) -> None:
        for pid in tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _said(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_SHOWN_LINES:])


def _end_with_parent() -> None:
    """Have the system ask this process to stop when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def tree(root: int) -> list[int]:
    """A process and all below it, each before those it has started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            after_name = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            children.setdefault(int(after_name.split()[1]), []).append(int(path.parent.name))
    found, queue = list[int](), [root]
    while queue:
        process = queue.pop(0)
        found.append(process)
        queue += children.get(process, [])
    return found
