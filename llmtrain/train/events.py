"""What happened to a run beside its numbers: RUN/events.jsonl, one line per event over all starts.

Invariant: a line is in the file when ``write`` returns, whole, whichever thread wrote it; lines are
only ever appended, so the history of a run that was killed and resumed is one list. The number of a
start of the run (its attempt) is counted here, and nowhere else.

    with Events(run.events_jsonl, rank=0, device=world.device, progress=progress) as events:
        events.listeners.append(tracker.alert)
        events.began()
        events.write("spike", "loss 9.1 is 14 deviations above the median of 50 rows, 3.2")
"""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal

import torch

from llmtrain import json_lines
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train.memory import Shortage

logger = logging.getLogger(__name__)

Kind = Literal[
    "start", "resumed", "skipped_step", "spike", "hang", "out_of_memory", "save_failed",
    "rollback", "corruption", "sink_failed", "preempted", "done", "failed",
]  # fmt: skip
"""What can happen to a run."""
Listener = Callable[[Kind, str], None]
"""Is told of every event: its kind and a sentence."""

_ENDINGS: dict[ExitReason, tuple[Kind, str]] = {
    ExitReason.DONE: ("done", "every step is done"),
    ExitReason.STOP_AT_STEP: ("done", "stopped where training.stop_at_step says"),
    ExitReason.PREEMPTED: ("preempted", "asked to stop by a signal, and saved"),
    ExitReason.TIME_LIMIT: ("preempted", "its time was up, and it saved"),
    ExitReason.SAVE_FAILED: ("failed", "the checkpoint to end with could not be written"),
    ExitReason.DIVERGED: ("failed", "the guard found no way on"),
    ExitReason.CORRUPTED: ("failed", "bits were wrong that nothing else has noticed"),
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
        past = max((event["attempt"] for event in json_lines.read(path)), default=0)
        self.attempt = past + 1 if rank == 0 else max(past, 1)
        """Number of this start of the run, from 1."""
        self.listeners: list[Listener] = []
        """Told of every event after it is in the file."""

    def began(self, **more: Any) -> None:
        """Say from which step this start of the run goes on; ``more`` as in ``write``."""
        if self._progress.step:
            self.write("resumed", f"goes on after step {self._progress.step}", **more)
        elif self.attempt > 1:
            self.write("start", "starts over at step 0", **more)
        else:
            self.write("start", "starts", **more)

    def ended(self, reason: ExitReason, why: str = "") -> None:
        """Say why the loop ended, in the words of ``why`` where there are any."""
        kind, text = _ENDINGS[reason]
        self.write(kind, why or text)

    def write(self, kind: Kind, text: str, step: int | None = None, **more: Any) -> None:
        """Append an event at ``step``, where the run is by default; any thread may call it.

        ``more`` are further fields of the line.
        """
        if self._rank and kind != "out_of_memory":
            return
        event = {
            "time": time.time(), "step": self._progress.step if step is None else step,
            "attempt": self.attempt, "kind": kind, "text": text, **more,
        }  # fmt: skip
        with self._lock:
            try:
                json_lines.append(self._path, event)
            except OSError as error:  # a full disk must not end the run
                logger.error("the event %s could not be written: %s", event, error)
        for listener in self.listeners:
            listener(kind, text)

    def heard_of_hang(self, text: str) -> None:
        """Tell the listeners of a hang; the supervisor has written the event itself."""
        for listener in self.listeners:
            listener("hang", text)

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
