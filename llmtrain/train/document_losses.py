"""The loss of every document in the batch of chosen steps, written to the run folder.

Nothing is computed twice: the loss of the step gives the cross entropy of every token anyway, and
at a chosen step, whose rows are numbered, it shows them to ``DocumentLosses.observe`` on the ranks
that hold the last stage. They add them up by document, and rank 0 joins what context-parallel ranks
have of the same row.

Invariant: no bit of a step depends on whether it was chosen, and on steps that are not, no rank
waits for its device or for another rank.

    losses = DocumentLosses(run.path, world, source_names, config.monitor)
    loss = pretraining_loss(2, 1024, observe=losses.observe)
    losses.asking(batches).at(0)          # what the loop pulls from
    losses.after_step(progress, result)   # a hook, on every rank
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmtrain.config.training import MonitorConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.document_loss import DocumentLoss, write_document_losses
from llmtrain.engine.protocol import StepResult
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress
from llmtrain.train.loop import BatchSource

logger = logging.getLogger(__name__)

_Columns = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""A line per document: [n, 3] of row, document, source; [n, 2] of targets and loss sum."""


class DocumentLosses:
    """Asks for the tokens' losses of chosen steps, takes them, and writes them by document."""

    def __init__(
        self,
        run: Path,
        world: World,
        source_names: Sequence[str],
        config: MonitorConfig,
    ) -> None:
        """Write to the run folder ``run`` at the steps that ``config`` chooses.

        ``source_names`` are those that the rows' ``source_ids`` index.
        """
        self._run = run
        self._world = world
        self._source_names = source_names
        self._every_steps = config.document_loss_every_steps
        self._steps = frozenset(config.document_loss_steps)
        self._seen: list[tuple[Tensor, StepBatch]] = []

    def chosen(self, step: int) -> bool:
        """Whether the losses of 1-based step ``step`` are written."""
        due = self._every_steps is not None and step % self._every_steps == 0
        return due or step in self._steps

    def asking(self, source: BatchSource) -> BatchSource:
        """Give the batches of ``source``, with numbered rows at chosen steps."""
        return _Asking(self, source, self._world.dp_rank)

    def observe(self, losses: Tensor, batch: StepBatch) -> None:
        """Keep the losses [B, S] of a micro-batch; of equal ones on tp ranks those of the first."""
        if self._world.tp_rank == 0:
            self._seen.append((losses.detach(), batch))

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Write the losses of a chosen step; every rank calls it."""
        if not self.chosen(progress.step):
            return
        seen, self._seen = self._seen, []
        parts = self._world.collect(_join([_by_document(*one) for one in seen]))
        if parts is None:
            return
        where, sums = _join(parts)
        found = (
            DocumentLoss(
                row=row, document=document, source=self._source_names[source],
                targets=targets, loss=total / targets if math.isfinite(total) else None,
            )
            for (row, document, source), (targets, total) in zip(
                where.tolist(), sums.tolist(), strict=True
            )
        )  # fmt: skip
        path = write_document_losses(self._run, progress.step, found)
        logger.info("losses of %d documents of step %d: %s", len(where), progress.step, path)


@dataclass(frozen=True, slots=True)
class _Asking:
    """A batch source whose batches ask for the losses of their tokens at chosen steps."""

    losses: DocumentLosses
    source: BatchSource
    dp_rank: int

    def at(self, step: int) -> StepBatch:
        """The batch of 0-based step ``step``."""
        batch = self.source.at(step)
        if not self.losses.chosen(step + 1):
            return batch
        rows = batch.tokens.shape[0]
        first = self.dp_rank * rows
        return replace(batch, row_ids=torch.arange(first, first + rows, dtype=torch.int32))


def _by_document(losses: Tensor, batch: StepBatch) -> _Columns:
    """Add up the losses of a micro-batch by row and document; waits for the device."""
    if batch.row_ids is None:
        raise ValueError("the rows of this micro-batch are not numbered")
    numbers = [batch.row_ids[:, None], batch.document_ids, batch.source_ids[:, None]]
    where = torch.stack([number.expand(losses.shape) for number in numbers], dim=-1).cpu().numpy()
    weights = batch.loss_weight.double().cpu().numpy()
    weighted = weights * losses.double().cpu().numpy()
    is_target = weights > 0
    return _added(
        where[is_target].astype(np.int64),
        np.stack([weights[is_target], weighted[is_target]], axis=-1),
    )


def _join(parts: Sequence[_Columns]) -> _Columns:
    """Join lines of several micro-batches or ranks, adding up those of one document."""
    none = (np.zeros((0, 3), dtype=np.int64), np.zeros((0, 2)))
    return _added(*(np.concatenate(column) for column in zip(none, *parts, strict=True)))


def _added(where: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> _Columns:
    """Add up the lines of each (row, document), in their order; sorted by both."""
    key = where[:, 0] * (where[:, 1].max(initial=0) + 1) + where[:, 1]
    _, first, line = np.unique(key, return_index=True, return_inverse=True)
    sums = [np.bincount(line, weights=value, minlength=len(first)) for value in values.T]
    return where[first], np.stack(sums, axis=-1)
