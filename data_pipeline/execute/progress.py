"""How far a phase of a stage is: a bar on a terminal, a line now and then elsewhere.

The bar moves by the cost of the tasks, so the time left does not jump when one shard is larger than
another; rates are averages since the phase was begun or gone on with.

    with Progress("02-c4 steps", num_tasks=40, cost=4_000_000_000, terminal=True) as progress:
        progress.add(cost, documents)
"""

import logging
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

LINE_SECONDS = 30.0
"""Time between two lines where there is no terminal."""
_BYTES = 1024
"""Tasks that cost less on average do not count bytes."""
_FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"

logger = logging.getLogger(__name__)


class Progress:
    """Counts the tasks of one phase."""

    def __init__(self, label: str, *, num_tasks: int, cost: int, terminal: bool) -> None:
        """``cost`` is that of all tasks together, in bytes where their input is known."""
        self.label = label
        self.num_tasks = num_tasks
        self.cost = max(1, cost)
        self.tasks = self.done = self.documents = 0
        self._counts_bytes = cost >= _BYTES * num_tasks
        self._started = self._said = time.monotonic()
        self._bar: Any = tqdm(
            total=self.cost, desc=label, leave=False, disable=not terminal, smoothing=0,
            bar_format=_FORMAT,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def add(self, cost: int, documents: int) -> None:
        """Count a task that is done."""
        self.tasks += 1
        self.done += cost
        self.documents += documents
        now = time.monotonic()
        self._bar.set_postfix_str(self.rates(now), refresh=False)
        self._bar.update(cost)
        self._bar.refresh()
        if self._bar.disable and now - self._said >= LINE_SECONDS and self.tasks < self.num_tasks:
            self._said = now
            logger.info("%s", self.line(now))

    def rates(self, now: float) -> str:
        """Tasks, and what they get through in a second."""
        seconds = max(1e-3, now - self._started)
        parts = [f"{self.tasks:,}/{self.num_tasks:,} tasks"]
        if self._counts_bytes:
            parts.append(f"{self.done / 1e6 / seconds:,.1f} MB/s")
        if self.documents:
            parts.append(f"{self.documents / seconds:,.0f} documents/s")
        return ", ".join(parts)

    def line(self, now: float) -> str:
        """The state as one line."""
        left = (now - self._started) * (self.cost - self.done) / max(1, self.done)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{self.label}: {100 * self.done / self.cost:.0f} %, {self.rates(now)}, "
            f"{f'{hours}:' if hours else ''}{minutes:02d}:{seconds:02d} left"
        )
