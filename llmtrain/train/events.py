"""What happened to a run beside its numbers: RUN/events.jsonl, one line per event over all starts.

Invariant: a line is in the file when ``write`` returns, whole, whichever thread wrote it; lines are
only ever appended, so the history of a run that was killed and resumed is one list. The number of a
start of the run (its attempt) is counted here, and nowhere else.

    with Events(run.events_jsonl, rank=0, device=world.device, progress=progress) as events:
        events.listeners.append(tracker.alert)
        events.began()
        events.write("spike", "loss 9.1 is 14 deviations above the median of 50 rows, 3.2")
"""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal

import torch

from llmtrain.train.memory import Shortage
from llmtrain.train.progress import Progress
from llmtrain.train.rundir import ExitReason

logger = logging.getLogger(__name__)

Kind = Literal[
    "start", "resumed", "skipped_step", "spike", "hang", "out_of_memory", "save_failed",
    "preempted", "done", "failed",
]  # fmt: skip
"""What can happen to a run."""
Listener = Callable[[Kind, str], None]
"""Is told of every event: its kind and a sentence."""

_ENDINGS: dict[ExitReason, tuple[Kind, str]] = {
    ExitReason.DONE: ("done", "every step is done"),
    ExitReason.STOP_AT_STEP: ("done", "stopped where training.stop_at_step says"),
    ExitReason.PREEMPTED: ("preempted", "asked to stop by a signal, and saved"),
    ExitReason.SAVE_FAILED: ("failed", "the checkpoint to end with could not be written"),
    ExitReason.DIVERGED: ("failed", "too many updates in a row were skipped"),
    ExitReason.PEER_LOST: ("failed", "another rank stopped answering; nothing was saved"),
}


class Events(AbstractContextManager["Events"]):
    """Appends to the list of events; what escapes the block is one, too."""

    def __init__(self, path: Path, *, rank: int, device: torch.device, progress: Progress) -> None:
        """Rank 0 writes to ``path``; of other ranks only that their own memory ran out."""
        self._path = path
        self._rank = rank
        self._device = device
        self._progress = progress
        self._lock = Lock()
        past = max((event["attempt"] for event in read_events(path)), default=0)
        self.attempt = past + 1 if rank == 0 else max(past, 1)
        """Number of this start of the run, from 1."""
        self.listeners: list[Listener] = []
        """Told of every event after it is in the file."""

    def began(self) -> None:
        """Say from which step this start of the run goes on."""
        if self._progress.step:
            self.write("resumed", f"goes on after step {self._progress.step}")
        elif self.attempt > 1:
            self.write("start", "starts over at step 0: there was no checkpoint yet")
        else:
            self.write("start", "starts")

    def ended(self, reason: ExitReason) -> None:
        """Say why the loop ended."""
        self.write(*_ENDINGS[reason])

    def write(self, kind: Kind, text: str, step: int | None = None) -> None:
        """Append an event at ``step``, where the run is by default; any thread may call it."""
        if self._rank and kind != "out_of_memory":
            return
        event = {
            "time": time.time(), "step": self._progress.step if step is None else step,
            "attempt": self.attempt, "kind": kind, "text": text,
        }  # fmt: skip
        with self._lock:
            try:
                _append(self._path, event)
            except OSError as error:  # a full disk must not end the run
                logger.error("the event %s could not be written: %s", event, error)
        for listener in self.listeners:
            listener(kind, text)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Say what escaped the block."""
        if error is None:
            return
        shortage = Shortage.of(error, self._device)
        if shortage is not None:
            self.write("out_of_memory", f"rank {self._rank}: {shortage}")
        else:
            said = str(error).splitlines()
            self.write("failed", f"{type(error).__name__}: {said[0]}" if said else repr(error))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of a run in order; none where there is no file. A line cut by a crash is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            events.append(json.loads(line))
    return events


def _append(path: Path, event: dict[str, Any]) -> None:
    """Write one line in one call, which appends it whole beside other processes' lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(event, ensure_ascii=False) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # a crash cut the line before
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)
