"""Held-out loss on the way: the same batches every time, per source.

Evaluation(engine, batches, num_batches=8, every_steps=100, source_names=names, report=add)
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import StepResult
from llmtrain.train.loop import BatchSource
from llmtrain.train.metrics import per_source
from llmtrain.train.progress import Progress


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
        batches: BatchSource,
        *,
        every_steps: int,
        num_batches: int,
        source_names: Sequence[str],
        report: Callable[[Mapping[str, Any], float], None] | None,
    ) -> None:
        """Evaluate every ``every_steps`` steps; ``report`` takes the fields and the seconds."""
        self._engine = engine
        self._batches = batches
        self._every_steps = every_steps
        self._num_batches = num_batches
        self._source_names = source_names
        self._report = report

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Evaluate where it is due."""
        if progress.step % self._every_steps and not progress.finished:
            return
        started = time.perf_counter()
        fields = self.run()
        if self._report is not None:
            self._report(fields, time.perf_counter() - started)

    def run(self) -> dict[str, Any]:
        """Evaluate now; gives ``validation_loss`` and ``validation_tokens`` by source."""
        sums: dict[str, Tensor] = {}
        for index in range(self._num_batches):
            for name, value in self._engine.eval_step(self._batches.at(index)).metrics.items():
                sums[name] = sums[name] + value if name in sums else value
        lists = {name: value.tolist() for name, value in sums.items()}
        return per_source(self._source_names, lists, prefix="validation_")
