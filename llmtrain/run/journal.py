"""The journal of a run that is being trained: kept in every checkpoint and in the run folder.

The checkpoint decides: what a run resumes with is the journal of the step it goes back to, what
the guard left out with it, and with what the configuration leaves out from there on.

    journal = RunJournal(plan, Mixing(plan), run.journal_json, accept_changed=False)
    checkpoints = Checkpoints(..., journal=journal)
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain.data.journal import Accepted, Journal, Skip, from_plain
from llmtrain.data.plan import BatchPlan
from llmtrain.run.directory import write_json
from llmtrain.run.mixing import Mixing

logger = logging.getLogger(__name__)


class RunJournal:
    """What the data of a run hangs on beside its configuration; alike on every rank."""

    def __init__(
        self, plan: BatchPlan, mixing: Mixing, path: Path | None, *, accept_changed: bool
    ) -> None:
        """Keep the journal of ``plan``; the rank with a ``path`` writes it there."""
        self._plan = plan
        self._mixing = mixing
        self._path = path
        self._accept_changed = accept_changed

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, and bring the run folder up to date."""
        self._mixing.settle()
        self.publish()
        return self._plan.journal.to_plain()

    def publish(self) -> None:
        """Write the journal into the run folder, unless it is empty and none is there."""
        journal = self._plan.journal
        if self._path is not None and (journal != Journal() or self._path.exists()):
            try:
                write_json(self._path, journal.to_plain())
            except OSError as error:  # the checkpoint has it too
                logger.error("%s was not written (%s); make room", self._path, error.strerror)

    def leaving_out(self, plain: Mapping[str, Any], skip: Skip) -> dict[str, Any]:
        """Return the journal of the checkpoint of ``skip.step`` as it is once the run went back."""
        saved = from_plain(plain)
        kept = [s for s in saved.skips if not (s.by_guard and s.step >= skip.step)]
        return replace(saved, skips=_in_order([*kept, skip])).to_plain()

    def resume(self, plain: Mapping[str, Any], step: int, changed: Sequence[str]) -> list[str]:
        """Take over the journal of a checkpoint of ``step``; returns why that may not be.

        ``changed`` are the facts about the data that are other than at the checkpoint.
        """
        saved = from_plain(plain)
        own = [skip for skip in self._plan.journal.skips if not skip.by_guard]
        guards = [skip for skip in saved.skips if skip.by_guard]
        problems = _other_past([s for s in saved.skips if not s.by_guard], own, step)
        accepted = saved.accepted
        if changed and self._accept_changed:
            logger.warning("going on at step %d with other data: %s", step, "; ".join(changed))
            accepted = (*accepted, Accepted(step, tuple(changed)))
        else:
            problems = [*changed, *problems]
        if not problems:
            self._plan.adopt(replace(saved, skips=_in_order([*own, *guards]), accepted=accepted))
            self._mixing.resume(step)
            self.publish()
        return problems


def _in_order(skips: Sequence[Skip]) -> tuple[Skip, ...]:
    return tuple(sorted(skips, key=lambda skip: skip.step))


def _other_past(saved: Sequence[Skip], own: Sequence[Skip], step: int) -> list[str]:
    """Say if the configuration leaves out other windows before ``step`` than the run did."""
    before = [[s for s in skips if s.step < step] for skips in (saved, own)]
    if before[0] == before[1]:
        return []
    found, asked = (
        ", ".join(f"{s.num_units} units at step {s.step + 1}" for s in skips) or "none"
        for skips in before
    )
    return [
        f"data.skip_steps leaves out {asked} before step {step}, which the run has passed with "
        f"{found}"
    ]
