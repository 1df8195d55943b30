"""Stops a run early enough that its last checkpoint is written before its time is up.

What a step and a save take is measured; the run stops where the time left holds a save, but not a
step more. Before the first save, ``checkpoint.grace_s`` stands for what it takes. A run that could
not save within the grace time it has after a signal is told so once, while all is well.

Invariant: the first rank alone decides; the others learn it where all ranks agree to stop. At least
one step is done, so that a run that is started again and again comes to its end. An evaluation
needs no time left for it: it asks on its way, and is left off.

    limit = TimeLimit(config.training.max_time_s, job_end(), grace_s=30.0, save_s=lambda: 4.1)
    while not (signalled() or limit.reached()):
        step()
        with limit.paused():
            evaluate(until=limit.reached)
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

RECENT_STEPS = 20
"""Steps of which the longest stands for the next."""
SPARE = 1.5
"""A save may take so many times what the newest took."""


class TimeLimit:
    """Asked once at every step boundary, and any number of times in a pause, on the first rank."""

    def __init__(
        self,
        max_time_s: float | None,
        job_end: float | None,
        *,
        grace_s: float,
        save_s: Callable[[], float | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Count ``max_time_s`` from now; ``job_end`` is a Unix time, as ``clock`` gives it.

        ``save_s`` gives the seconds the newest save took until it was on disk, None before it.
        """
        ends = [] if max_time_s is None else [(clock() + max_time_s, "training.max_time_s")]
        ends += [] if job_end is None else [(job_end, "SLURM_JOB_END_TIME")]
        self._end, self._name = min(ends, default=(math.inf, ""))
        self._grace_s = grace_s
        self._save_s = save_s
        self._clock = clock
        self._last: float | None = None
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._warned = False
        self._pauses = False
        self.why = ""
        """What ended the run, in one sentence; empty while there is time."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is no step, and that can be left off as soon as time is up."""
        began, self._pauses = self._clock(), True
        try:
            yield
        finally:
            self._pauses = False
            if self._last is not None:
                self._last += self._clock() - began

    def reached(self) -> bool:
        """Whether the run stops here; what lies between two calls is a step with all around it."""
        now = self._clock()
        if self._pauses:
            return self._is_short(now, 0.0, self._save_s())
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        if not self._steps or self.why:
            return bool(self.why)
        step_s, save_s = max(self._steps), self._save_s()
        self._warn_of_grace(step_s, save_s)
        return self._is_short(now, step_s, save_s)

    def _is_short(self, now: float, step_s: float, save_s: float | None) -> bool:
        """Whether the time left does not hold a step and a save; then ``why`` says so."""
        reserve_s = self._grace_s if save_s is None else SPARE * save_s
        left_s = self._end - now
        if not self.why and left_s < step_s + reserve_s:
            step = f"a step of {step_s:.1f} s and " if step_s else ""
            self.why = (
                f"{self._name} leaves {left_s:.1f} s, less than {step}{reserve_s:.1f} s for a "
                "save: saved and stopped"
            )
        return bool(self.why)

    def _warn_of_grace(self, step_s: float, save_s: float | None) -> None:
        """Say once that a run asked to stop could not save in time."""
        if save_s is None or self._warned or step_s + save_s <= self._grace_s:
            return
        self._warned = True
        logger.warning(
            "a step of up to %.1f s and a save of %.1f s are more than checkpoint.grace_s=%g: a "
            "run that is asked to stop would be killed before its checkpoint is written; save to a "
            "faster disk, or give it more time: launch.signal_s, launch.grace_s, or where "
            "something else starts it, checkpoint.grace_s itself",
            step_s, save_s, self._grace_s,
        )  # fmt: skip
