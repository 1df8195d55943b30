"""From windows of token stores to the tensors of a step: targets, positions, document ids, weights.

Document boundaries come from the index of the store, never from a token. A target that belongs to
another document than its input is no target; positions and document ids restart in every row.

    assemble([store], np.zeros(8, np.int32), np.arange(8) * 512, 512, num_microbatches=2)
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.indexed import Int64Array
from llmtrain.data.store import TokenStore


def assemble(
    stores: Sequence[TokenStore],
    sources: npt.NDArray[np.int32],
    starts: Int64Array,
    sequence_length: int,
    num_microbatches: int,
) -> StepBatch:
    """Read one row of ``sequence_length`` inputs from token ``starts[r]`` of source ``sources[r]``.

    Every row lies within its store, the target of its last input included.
    """
    shape = (len(sources), sequence_length)
    tokens, targets = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    row_parts, offset_parts = [], []
    for source in np.unique(sources).tolist():
        rows = np.flatnonzero(sources == source)
        stores[source].read_windows(starts[rows], rows, tokens, targets)
        # a document that begins at the first input is no boundary inside the row
        found, offsets = stores[source].boundaries(starts[rows] + 1, sequence_length)
        row_parts.append(rows[found])
        offset_parts.append(offsets + 1)
    row, offset = np.concatenate(row_parts), np.concatenate(offset_parts)
    weight = np.ones(shape, dtype=np.float32)
    targets[row, offset - 1] = IGNORE_INDEX
    weight[row, offset - 1] = 0.0
    inside = offset < sequence_length
    positions, document_ids = _segments(row[inside], offset[inside], shape)
    return StepBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
        loss_weight=torch.from_numpy(weight),
        source_ids=torch.from_numpy(sources.astype(np.int32)),
        num_microbatches=num_microbatches,
    )


def _segments(
    row: Int64Array, offset: Int64Array, shape: tuple[int, int]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return positions and document ids [R, S] of rows in which documents begin at ``offset`` > 0.

    ``row`` and ``offset`` are sorted within each row; rows may come in any order.
    """
    num_rows, length = shape
    row_starts = np.arange(num_rows) * length
    starts = np.sort(np.concatenate([row_starts, row * length + offset]))
    lengths = np.diff(starts, append=num_rows * length)
    number = np.arange(len(starts))
    row_of = starts // length
    first_of_row = np.searchsorted(starts, row_starts)
    ordinal = (number - first_of_row[row_of]).astype(np.int32)
    document_ids = np.repeat(ordinal, lengths).reshape(shape)
    origin = np.repeat((starts - row_of * length).astype(np.int32), lengths).reshape(shape)
    positions = np.subtract(np.arange(length, dtype=np.int32), origin, out=origin)
    return positions, document_ids
