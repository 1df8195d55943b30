"""Where the losses of a run decide on its mixture: one decision every interval of its stream.

The sums of the losses stay on the device; the host waits for them once an interval. All ranks see
the same sums and decide alike. What was decided goes into the journal of the plan, and so does, at
a save, what was summed since: a resumed run decides as one that never stopped.

    mixing = Mixing(plan)          # a hook of the loop; does nothing where the mixture is fixed
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from llmtrain.data.adaptive import AdaptiveSchedule
from llmtrain.data.plan import BatchPlan
from llmtrain.engine.protocol import StepResult
from llmtrain.run.progress import Progress

logger = logging.getLogger(__name__)


class Mixing:
    """Hook that hands the losses of the sources to an adaptive mixture."""

    def __init__(self, plan: BatchPlan) -> None:
        """Decide for ``plan``."""
        self._plan = plan
        schedule = plan.mixture.schedule
        self._schedule = schedule if isinstance(schedule, AdaptiveSchedule) else None
        self._sums: Tensor | None = None
        self._decide_before(0)

    def resume(self, step: int) -> None:
        """Go on after ``step`` steps with what the journal of the plan had summed."""
        summed = self._plan.journal.undecided
        self._sums = torch.tensor(summed, dtype=torch.float64) if summed else None
        self._decide_before(step)

    def settle(self) -> None:
        """Put what was summed since the last decision into the journal."""
        if self._schedule is not None:
            pairs = () if self._sums is None else tuple(map(_pair, self._sums.tolist()))
            self._plan.journal = replace(self._plan.journal, undecided=pairs)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Add the losses of a step; decide where an interval ends."""
        schedule = self._schedule
        if schedule is None:
            return
        losses = torch.stack(
            [result.metrics["source_loss_sum"], result.metrics["source_tokens"]], dim=1
        ).to(torch.float64)[: schedule.num_sources]
        losses = torch.where(result.applied, losses, 0)
        self._sums = losses if self._sums is None else self._sums.to(losses.device) + losses
        self._decide_before(progress.step)

    def _decide_before(self, step: int) -> None:
        """Decide on the intervals that are due before 0-based ``step``: several after a skip."""
        schedule = self._schedule
        while schedule is not None and self._plan.first_unit(step) >= schedule.decides_after:
            nothing = [[0.0, 0.0]] * schedule.num_sources
            summed = nothing if self._sums is None else self._sums.tolist()
            self._sums = None
            change = self._plan.decide([_pair(pair) for pair in summed])
            logger.info(
                "from window %d on the mixture is %s", change.first_unit,
                self._plan.named_shares(change),
            )  # fmt: skip


def _pair(values: list[float]) -> tuple[float, float]:
    loss, targets = values
    return loss, targets
