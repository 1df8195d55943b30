"""What submitit runs on every node of a trial: the node's ranks, as the batch script starts them.

Invariant: submitit's signal before the time limit, or at a preemption, makes the run save; then the
job is queued again, as long as the start came a step further.

    executor.submit(OnNodes("runs/lr/trial-000", ranks=8, words=("experiment=mine",)))
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from submitit.helpers import DelayedSubmission

from llmtrain.errors import CheckpointError
from llmtrain.run.directory import RunDirectory, read_json

_ALONE = 'shift\nexec "$python" -m llmtrain.launch.supervise -- "$python" -m llmtrain train "$@"'
_LOOK_S = 0.1


class OnNodes:
    """A callable for submitit, sent to every node."""

    def __init__(
        self, run: str, ranks: int, words: Sequence[str], alone: bool = False, requeue: bool = True
    ) -> None:
        """Take the folder of the run, the ranks of a node and the training command line."""
        self.run, self.ranks, self.words = run, ranks, tuple(words)
        self.alone, self.requeue = alone, requeue
        self._pid = 0
        self._asked = False
        self._before = 0

    def __call__(self) -> int:
        """Start the ranks of this node and wait; gives the status of what started them."""
        self._before = _status(self.run)[1]
        script = _ALONE if self.alone else 'eval "$train"'
        self._pid, self._asked = 0, False
        child = subprocess.Popen(
            ["bash", "-c", script, "node", str(self.ranks), *self.words],
            preexec_fn=_shield, start_new_session=True,
        )  # fmt: skip
        self._pid = child.pid
        signal.signal(signal.SIGUSR1, self._pass_on)
        if self._asked:
            self._pass_on(signal.SIGUSR1, None)
        while (status := child.poll()) is None:
            time.sleep(_LOOK_S)
        return status

    def checkpoint(self) -> DelayedSubmission | None:
        """Let the run save; what submitit is to queue again, None where that would be in vain."""
        self._pass_on(signal.SIGUSR1, None)
        if self._pid:  # else it comes while the run is being started, which has nothing to save
            with suppress(ChildProcessError):
                flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
                while os.waitid(os.P_PID, self._pid, flags) is None:
                    time.sleep(_LOOK_S)
            code, step = _status(self.run)
            if code != 3 or step <= self._before:
                return None
        if not self.requeue:
            return None
        return DelayedSubmission(
            OnNodes(self.run, self.ranks, self.words, self.alone, self.requeue)
        )

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._pid:  # 0 would be everyone of this process group
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGUSR1)


def _shield() -> None:
    """Slurm sends its signals to every process of a step; launchers would end by them."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _status(run: str) -> tuple[int | None, int]:
    """How the run ended last and at which step."""
    try:
        status: dict[str, Any] = read_json(RunDirectory(Path(run)).status_json)
    except (OSError, CheckpointError):
        return None, 0
    return status.get("code"), int(status.get("step", 0))
