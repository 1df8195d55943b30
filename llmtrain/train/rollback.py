"""Going back: the newest checkpoint before a spike, and a journal that leaves out what led to it.

Only the run's folder is changed here: the checkpoint is told what its run leaves out from there on,
and newer ones are deleted. What is in memory is loaded from it afterwards, as at any start, so a
process that is killed in between goes on as one that is not: before the change it meets the same
spike again, after it the run has gone back.

Left out are the batches from the checkpoint to the spike, both of those that led to it and of those
between: a spike follows from data and the state they meet together (arXiv:2204.02311, section 5.1),
so the run takes the same state past other data. If it spikes again before another checkpoint, the
state itself is suspect, and the run goes back one checkpoint further where there is one.

    reason = go_back(guard, checkpoints, plan, journal, tell=events.write, trace=command,
                     reached=progress.step)
"""

import logging
from typing import Any, Protocol

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.data.plan import BatchPlan
from llmtrain.run.directory import ExitReason
from llmtrain.run.journal import RunJournal
from llmtrain.train.events import Kind
from llmtrain.train.guard import Guard, Rollback

logger = logging.getLogger(__name__)


class Tell(Protocol):
    """Takes events, as ``Events.write`` does."""

    def __call__(self, kind: Kind, text: str, step: int | None = None, **more: Any) -> None:
        """Take an event with further fields."""
        ...


def go_back(
    guard: Guard,
    checkpoints: Checkpoints,
    plan: BatchPlan,
    journal: RunJournal,
    *,
    tell: Tell,
    trace: str,
    reached: int,
) -> ExitReason:
    """Do to the run's folder what ``guard.rollback`` asks for; every rank calls it.

    Returns ROLLED_BACK where the run is to be resumed, and what stops it where there is nothing to
    go back to. ``trace`` is the command that names the documents of this attempt, which has
    ``reached`` a step: all after the checkpoint's are undone.
    """
    rollback = guard.rollback
    if rollback is None:
        raise RuntimeError("the guard asks for no rollback")
    found = _target(rollback, guard, checkpoints)
    if found is None:
        guard.stop(
            f"{rollback.why}; there is no checkpoint before step {rollback.first} to go back to: "
            "set checkpoint.keep_last higher or checkpoint.every_steps lower"
        )
        return ExitReason.DIVERGED
    left_out = found.meta.get("journal", {})
    text = f"{rollback.why}; going back to step {found.step}"
    if rollback.last is None:
        text += ", to make the same steps again"
    else:
        skip = plan.leave_out(found.step, rollback.last - 1)
        left_out = journal.leaving_out(left_out, skip)
        text += (
            f" and leaving out the {skip.num_units} windows of the batches of steps "
            f"{found.step + 1} to {rollback.last}; {trace} step={rollback.last} names the "
            f"documents; a new run does the same with data.skip_steps={skip_steps(plan, left_out)}"
        )
    logger.warning("%s", text)
    before, at = plan.journal.to_plain(), rollback.last or reached
    tell("rollback", text, at, to_step=found.step, reached=reached, journal=before)
    saved = found.meta.get("guard") or guard.to_plain()
    times = [*guard.rolled_back_to, found.step]
    checkpoints.go_back(found, journal=left_out, guard={**saved, "rolled_back_to": times})
    return ExitReason.ROLLED_BACK


def skip_steps(plan: BatchPlan, journal: dict[str, Any]) -> str:
    """Return the windows that ``journal`` leaves out as a value of data.skip_steps.

    On a ramp, where they may be no whole steps of what would be in their place, the last step is
    the one they end in.
    """
    units: dict[int, int] = {}
    for skip in journal["skips"]:
        units[skip["step"]] = units.get(skip["step"], 0) + skip["num_units"]
    parts = []
    for step, count in units.items():
        last = plan.steps.step_of(plan.steps.shape(step).first_unit + count - 1) + 1
        parts.append(f"[{step + 1},{last}]")
    return f"[{','.join(parts)}]"


def _target(
    rollback: Rollback, guard: Guard, checkpoints: Checkpoints
) -> archive.Checkpoint | None:
    """Find the checkpoint to go back to, one further where the run was at that one already."""
    found = checkpoints.before(rollback.first)
    if found is not None and found.step in guard.rolled_back_to:
        return checkpoints.before(found.step) or found
    return found
