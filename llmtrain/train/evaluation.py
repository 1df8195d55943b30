"""Held-out loss on the way: the same batches every time, per source.

It asks between batches whether the run is to stop, and is then left off: time is short.

    Evaluation(engine, batches, device, every_steps=100, report=metrics.add)
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.data.held_out import EvaluationBatches
from llmtrain.engine.protocol import StepResult
from llmtrain.run.progress import Progress
from llmtrain.train.metrics import per_source
from llmtrain.train.preference_loss import held_out_fields

logger = logging.getLogger(__name__)

Pause = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Context of an evaluation; gives what all ranks ask alike, whether it is to be left off."""


@contextmanager
def endless() -> Iterator[Callable[[], bool]]:
    """Pause of an evaluation that always comes to its end."""
    yield lambda: False


class Evaluator(Protocol):
    """The part of an engine that evaluation needs."""

    def eval_step(self, batch: StepBatch) -> StepResult:
        """Forward only; every rank calls it."""
        ...


class Evaluation:
    """Hook that runs on every rank, before the metrics hook of the rank that writes."""

    def __init__(
        self,
        engine: Evaluator,
        batches: EvaluationBatches,
        device: torch.device,
        *,
        every_steps: int,
        report: Callable[[Mapping[str, Any], float], None] | None,
        pause: Pause = endless,
    ) -> None:
        """Evaluate every ``every_steps`` steps; ``report`` takes the fields and the seconds."""
        self._engine = engine
        self._batches = batches
        self._device = device
        self._every_steps = every_steps
        self._report = report
        self._pause = pause
        self._measured: tuple[int, dict[str, float]] = (-1, {})

    def scores(self, step: int) -> dict[str, float]:
        """Held-out loss of all sources, and of each, where it was measured at ``step``."""
        measured, found = self._measured
        return found if measured == step else {}

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Evaluate where it is due."""
        if progress.step % self._every_steps and not progress.finished:
            return
        result.applied.item()  # the training steps before are not evaluation time
        started = time.perf_counter()
        with self._pause() as stop:
            fields = self.run(stop)
        if fields is None:
            logger.warning(
                "step %d: evaluation left off, the run stops or goes back", progress.step
            )
            return
        self._measured = (progress.step, _scores(fields))
        if self._report is not None:
            self._report(fields, time.perf_counter() - started)

    def run(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Evaluate now; gives ``validation_loss`` and ``validation_tokens`` by source.

        Of preferences also ``validation_margin`` and ``validation_accuracy``. None where ``stop``
        was true between two batches.
        """
        sums: dict[str, Tensor] = {}
        for batch in self._batches:
            if stop():
                return None
            for name, value in self._engine.eval_step(batch.to(self._device)).metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        lists = {name: value.tolist() for name, value in sums.items()}
        names = self._batches.source_names
        return per_source(names, lists, prefix="validation_") | held_out_fields(names, lists)


def _scores(fields: Mapping[str, Any]) -> dict[str, float]:
    """The losses of ``run`` by name, and their mean over all targets."""
    losses, counts = fields["validation_loss"], fields["validation_tokens"]
    known = {name: loss for name, loss in losses.items() if loss is not None}
    total = sum(counts[name] for name in known)
    if not total:
        return {}
    mean = sum(loss * counts[name] for name, loss in known.items()) / total
    return {"validation_loss": mean, **{f"validation_loss/{n}": x for n, x in known.items()}}
