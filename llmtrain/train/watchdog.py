"""Says when no step ends any more: a thread beside the loop, on the rank that writes.

It observes only; what ends a run whose peers are lost is the time-out of the collectives.

    watchdog = stack.enter_context(Watchdog(hang_s=300, events=events))
    hooks.append(watchdog)
"""

import logging
import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType

from llmtrain.engine.protocol import StepResult
from llmtrain.train.events import Events
from llmtrain.train.progress import Progress

logger = logging.getLogger(__name__)


class Watchdog(AbstractContextManager["Watchdog"]):
    """Hook and context: an event when no step ended for ``hang_s``, once until the next one."""

    def __init__(self, hang_s: float, events: Events) -> None:
        """Count from the entry of the block."""
        self._hang_s = hang_s
        self._events = events
        self._last = time.monotonic()
        self._said = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Begin to watch."""
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self._over.set()
        self._thread.join()

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Note that a step ended."""
        now = time.monotonic()
        if self._said:
            logger.warning("steps end again, after %.0f s", now - self._last)
        self._last, self._said = now, False

    def _watch(self) -> None:
        while not self._over.wait(min(self._hang_s / 4, 10.0)):
            still_s = time.monotonic() - self._last
            if still_s < self._hang_s or self._said:
                continue
            self._said = True
            text = (
                f"no step ended for {still_s:.0f} s; the ranks' logs and the state of their "
                "processes (py-spy dump --pid PID) tell where they wait"
            )
            logger.error(text)
            self._events.write("hang", text)
