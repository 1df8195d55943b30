"""Held-out batches: every window of the validation stores once, the same on any number of ranks.

Unlike a training plan nothing is shuffled, mixed or dropped: the tail of a store is a padded row,
so a store may be shorter than a window, and rows that only fill up the last batch have weight 0.

    held_out = EvaluationBatches({"wiki": store}, sequence_length=512, micro_batch_size=8)
    for batch in held_out: ...
"""

from collections.abc import Iterator, Mapping

import numpy as np

from llmtrain.config.parallel import microbatches_per_rank
from llmtrain.config.run import RunConfig
from llmtrain.data.assemble import assemble_pieces
from llmtrain.data.batch import StepBatch
from llmtrain.data.indexed import Int64Array
from llmtrain.data.order import Pieces
from llmtrain.data.store import TokenStore, open_sources


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
        sources, windows = [], []
        for i in range(len(self._stores)):
            total = self.windows_in(i)
            count = total if max_windows is None else min(total, max_windows)
            sources.append(np.full(count, i, dtype=np.int32))
            windows.append(np.arange(count) * total // max(count, 1))
        self._sources, self._windows = np.concatenate(sources), np.concatenate(windows)

    def windows_in(self, source: int) -> int:
        """Count the windows of a source."""
        num_inputs: int = self._stores[source].num_tokens - 1
        return -(-num_inputs // self._sequence_length)

    def pieces(self, source: int, rows: Int64Array, windows: Int64Array) -> Pieces:
        """Return what some windows of a source are made of, placed in ``rows``."""
        starts = windows * self._sequence_length
        length = np.minimum(self._sequence_length, self._stores[source].num_tokens - 1 - starts)
        return Pieces(rows, np.zeros_like(rows), starts, length)

    def __len__(self) -> int:
        return -(-len(self._sources) // (self._num_rows * self._dp_size))

    def __iter__(self) -> Iterator[StepBatch]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> StepBatch:
        """Return this rank's rows of batch ``index``, padded to the full shape."""
        sources = np.zeros(self._num_rows, dtype=np.int32)
        given = self._sources[self._rows(index)]
        sources[: len(given)] = given
        parts = [(self._stores[source], pieces) for source, pieces in self.placed(index)]
        return assemble_pieces(
            parts, sources, sequence_length=self._sequence_length,
            num_microbatches=self._num_microbatches,
        )  # fmt: skip

    def placed(self, index: int) -> list[tuple[int, Pieces]]:
        """Name what this rank's rows of batch ``index`` hold, source by source."""
        given, windows = self._sources[self._rows(index)], self._windows[self._rows(index)]
        found = []
        for source in np.unique(given).tolist():
            (rows,) = np.nonzero(given == source)
            found.append((source, self.pieces(source, rows, windows[rows])))
        return found

    def _rows(self, index: int) -> slice:
        first = (index * self._dp_size + self._dp_rank) * self._num_rows
        return slice(first, first + self._num_rows)


def held_out_of(config: RunConfig, dp_rank: int, dp_size: int) -> EvaluationBatches | None:
    """What a rank of a run scores, in batches like the last of training; None where nothing is."""
    training, data = config.training, config.data
    if config.evaluation.every_steps is None or not data.validation:
        return None
    return EvaluationBatches(
        open_sources(data.validation, data.cache_dir, check=False),
        sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size,
        num_microbatches=microbatches_per_rank(
            config.parallel, training.global_batch_size, dp_size, training.micro_batch_size
        ),
        dp_rank=dp_rank,
        dp_size=dp_size,
        max_windows=config.evaluation.windows_per_source,
    )
