"""Held-out batches: every window of the validation stores once, the same on any number of ranks.

Unlike a training plan nothing is shuffled, mixed or dropped: the tail of a store is a padded row,
so a store may be shorter than a window, and rows that only fill up the last batch have weight 0.

    held_out = EvaluationBatches({"wiki": store}, sequence_length=512, micro_batch_size=8)
    for batch in held_out: ...
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from llmtrain.data.assemble import assemble
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.store import TokenStore

ROW_FIELDS = ("tokens", "targets", "positions", "document_ids", "loss_weight")
"""Tensors of a batch that have one row of S values per sequence."""


class EvaluationBatches:
    """The rows of one data-parallel rank; every rank has the same number of batches."""

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        *,
        sequence_length: int,
        micro_batch_size: int,
        num_microbatches: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_windows: int | None = None,
    ) -> None:
        """Read all windows, or at most ``max_windows`` of each store, spread evenly over it."""
        self.source_names = tuple(sorted(stores))
        self._stores = tuple(stores[name] for name in self.source_names)
        self._num_rows = micro_batch_size * num_microbatches
        self._num_microbatches = num_microbatches
        self._sequence_length = sequence_length
        self._dp_rank, self._dp_size = dp_rank, dp_size
        sources, starts = [], []
        for i, store in enumerate(self._stores):
            total = -(-(store.num_tokens - 1) // sequence_length)
            count = total if max_windows is None else min(total, max_windows)
            sources.append(np.full(count, i, dtype=np.int32))
            starts.append(np.arange(count) * total // max(count, 1) * sequence_length)
        self._sources, self._starts = np.concatenate(sources), np.concatenate(starts)

    def __len__(self) -> int:
        return -(-len(self._sources) // (self._num_rows * self._dp_size))

    def __iter__(self) -> Iterator[StepBatch]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> StepBatch:
        """Return this rank's rows of batch ``index``, padded to the full shape."""
        first = (index * self._dp_size + self._dp_rank) * self._num_rows
        sources = self._sources[first : first + self._num_rows]
        starts = self._starts[first : first + self._num_rows]
        length = self._sequence_length
        batch = _blank(self._num_rows, length, self._num_microbatches)
        batch.source_ids[: len(sources)] = torch.from_numpy(sources)
        totals = np.array([store.num_tokens for store in self._stores])
        usable = np.minimum(length, totals[sources] - 1 - starts)
        for width in np.unique(usable).tolist():
            rows = np.flatnonzero(usable == width)
            part = assemble(self._stores, sources[rows], starts[rows], width, 1)
            for name in ROW_FIELDS:
                getattr(batch, name)[rows, :width] = getattr(part, name)
            batch.document_ids[rows, width:] = part.document_ids[:, -1:] + 1
        return batch


def _blank(num_rows: int, length: int, num_microbatches: int) -> StepBatch:
    """Return rows that hold no target."""
    shape = (num_rows, length)
    return StepBatch(
        tokens=torch.zeros(shape, dtype=torch.int64),
        targets=torch.full(shape, IGNORE_INDEX),
        positions=torch.arange(length, dtype=torch.int32).repeat(num_rows, 1),
        document_ids=torch.zeros(shape, dtype=torch.int32),
        loss_weight=torch.zeros(shape),
        source_ids=torch.zeros(num_rows, dtype=torch.int32),
        num_microbatches=num_microbatches,
    )
