"""The training loop: pull, step, observe, save.

It holds no collective, no logging arithmetic and no question about the rank. Whatever it is given
answers alike on every rank, so all ranks leave it after the same step.

    reason = train(engine, batches, schedule=lr, guard=guard, checkpoints=checkpoints, ...)
"""

import gc
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import Engine, StepResult
from llmtrain.optim.schedule import Schedule
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train.guard import Guard


class BatchSource(Protocol):
    """Where batches come from: the batch of a step is a function of the step alone."""

    def at(self, step: int) -> StepBatch:
        """Rows of this rank for the step after ``step`` steps are done."""
        ...


class Saver(Protocol):
    """Keeps what a run can go on from."""

    @property
    def stalled_s(self) -> float:
        """Seconds that training has stood still for saves, those before an update included."""
        ...

    def due(self, progress: Progress) -> bool:
        """Whether to save after this step."""
        ...

    def save(self, progress: Progress) -> bool:
        """Save, perhaps behind the steps that follow; False where this or the one before failed.

        That is said already.
        """
        ...

    def wait(self) -> bool:
        """Wait for a save in flight; whether the last one that was asked for is on disk."""
        ...


class Hook(Protocol):
    """Reads what a step did; never changes it."""

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Called on every rank that has the hook, after each step."""
        ...


def train(
    engine: Engine,
    batches: BatchSource,
    *,
    progress: Progress,
    schedule: Schedule,
    guard: Guard,
    checkpoints: Saver,
    hooks: Sequence[Hook] = (),
) -> ExitReason:
    """Run steps until ``progress`` is finished or the ranks agree to stop; says why it ended."""
    while not progress.finished and not guard.stop_requested():
        rate = schedule(progress.next_tokens)
        result = engine.train_step(batches.at(progress.step), rate, guard.limits)
        progress.advance()
        guard.observe(progress, result)
        for hook in hooks:
            hook.after_step(progress, result)
        if checkpoints.due(progress) and guard.look():
            checkpoints.save(progress)
    if guard.reason is ExitReason.PREEMPTED and guard.look():
        checkpoints.save(progress)
    elif guard.reason is not None:
        return guard.reason
    if not checkpoints.wait():
        return ExitReason.SAVE_FAILED
    return guard.reason or progress.end_reason


class GarbageCollection:
    """Hook and context: Python collects garbage at fixed steps, on all ranks together.

    A collection that strikes one rank in the middle of a step makes every other rank wait.
    """

    def __init__(self, every_steps: int = 200) -> None:
        self._every_steps = every_steps

    def __enter__(self) -> "GarbageCollection":
        """Collect once and switch the automatic collection off."""
        gc.collect()
        gc.disable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Switch the automatic collection on again."""
        gc.enable()

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Collect young garbage when the step is one to collect at."""
        if progress.step % self._every_steps == 0:
            gc.collect(1)
