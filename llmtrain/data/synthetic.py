"""Batches made from a seed alone, for comparing layouts and for timing where no store is needed.

Invariant: the global batch is a function of (seed, step) and sizes; ranks slice it, so every layout
sees the same rows. Rows hold several documents, masks are uneven between rows and weights differ,
so that a loss averaged in the wrong place cannot go unnoticed.

    batch = synthetic_batch(shape, seed=0, step=0)            # the whole global batch
    mine = rank_rows(batch, dp_rank, dp_size, micro_batch_size=1)
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.parallel import ParallelConfig, microbatches_per_rank
from llmtrain.data.batch import IGNORE_INDEX, StepBatch

ONE_STAGE = ParallelConfig()

_MEAN_DOCUMENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """Sizes of a synthetic global batch."""

    rows: int
    """Rows over all ranks."""
    sequence_length: int
    """Tokens in a row."""
    vocab_size: int
    """Token ids are below it."""
    num_sources: int = 2
    """Rows alternate between so many sources."""


def synthetic_batch(shape: BatchShape, seed: int, step: int) -> StepBatch:
    """Make the global batch of one step, as one micro-batch."""
    generator = np.random.default_rng([seed, step])
    rows, length = shape.rows, shape.sequence_length
    window = generator.integers(0, shape.vocab_size, size=(rows, length + 1))
    starts = generator.random((rows, length + 1)) < _MEAN_DOCUMENTS / length
    starts[:, 0] = True
    documents = np.cumsum(starts, axis=1) - 1
    index = np.arange(length + 1)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    masked = generator.random((rows, length)) < np.linspace(0.0, 0.7, rows)[:, None]
    is_target = (documents[:, :-1] == documents[:, 1:]) & ~masked
    weight = np.where(is_target, generator.choice([0.5, 1.0], size=(rows, length)), 0.0)
    return StepBatch(
        tokens=torch.from_numpy(window[:, :-1].copy()),
        targets=torch.from_numpy(np.where(is_target, window[:, 1:], IGNORE_INDEX)),
        positions=torch.from_numpy(positions[:, :-1].astype(np.int32)),
        document_ids=torch.from_numpy(documents[:, :-1].astype(np.int32)),
        loss_weight=torch.from_numpy(weight.astype(np.float32)),
        source_ids=torch.arange(rows, dtype=torch.int32) % shape.num_sources,
        num_microbatches=1,
    )


def rank_rows(
    batch: StepBatch,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    parallel: ParallelConfig = ONE_STAGE,
) -> StepBatch:
    """Cut the rows of one data-parallel rank out of a global batch, filled up as in training."""
    num_rows, length = batch.tokens.shape
    count = microbatches_per_rank(parallel, num_rows, dp_size, micro_batch_size)
    share = count * micro_batch_size
    rows = slice(dp_rank * share, (dp_rank + 1) * share)
    missing = share - len(batch.tokens[rows])

    def filled(values: Tensor, padding: int) -> Tensor:
        rest = values.new_full((missing, *values.shape[1:]), padding)
        return torch.cat([values[rows], rest]) if missing else values[rows]

    positions = filled(batch.positions, 0)
    positions[share - missing :] = torch.arange(length, dtype=positions.dtype)
    return replace(
        batch,
        tokens=filled(batch.tokens, 0),
        targets=filled(batch.targets, IGNORE_INDEX),
        positions=positions,
        document_ids=filled(batch.document_ids, 0),
        loss_weight=filled(batch.loss_weight, 0),
        source_ids=filled(batch.source_ids, 0),
        num_microbatches=count,
    )
