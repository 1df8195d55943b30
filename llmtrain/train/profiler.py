"""A trace of some steps of a run, for Perfetto; nothing where none is asked for.

Invariant: outside the steps asked for, and the one before them in which the tracer warms up, no
profiler is on. Every rank writes its own file, whole or not at all.

    with Profiler(run.path / "traces", rank=0, steps=(11, 12), progress=progress) as profiler:
        loop.train(..., hooks=[..., profiler])     # RUN/traces/rank0.json.gz
"""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from llmtrain.engine.protocol import StepResult
from llmtrain.run.progress import Progress

logger = logging.getLogger(__name__)


class Profiler(AbstractContextManager["Profiler"]):
    """Hook and context: traces the steps ``first`` to ``last``, both counted from 1."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        steps: tuple[int, int],
        progress: Progress,
        announce: bool = True,
    ) -> None:
        """``folder`` gets ``rank<N>.json.gz``; ``progress`` is where the run goes on from.

        ``announce`` logs where the trace is.
        """
        self.path = folder / f"rank{rank}.json.gz"
        self._first, self._last = steps
        self._announce = announce
        self._before = progress.step
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=self._action,
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def __enter__(self) -> "Profiler":
        """Begin to count steps; the tracer starts when its step comes."""
        self._profile.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop; a trace that the end of the run cut short is written as far as it came."""
        self._profile.stop()

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Let the profiler see a step end."""
        self._profile.step()

    def _action(self, number: int) -> ProfilerAction:
        """Tell what to do in step ``number``, from 0, of this process."""
        step = self._before + number + 1
        if self._first <= step < self._last:
            return ProfilerAction.RECORD
        if step == self._last:
            return ProfilerAction.RECORD_AND_SAVE
        return ProfilerAction.WARMUP if step == self._first - 1 else ProfilerAction.NONE

    def _write(self, made: "profile") -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".tmp-{self.path.name}")
        made.export_chrome_trace(str(beside))
        beside.replace(self.path)
        if self._announce:
            logger.info("trace of steps %d to %d: %s", self._first, self._last, self.path)
