"""The batches a bench runs on: random tokens in documents of random length, every token a target.

Invariant: a batch is a function of (seed, number), as ``data.synthetic`` makes it.

    batch = bench_batch(config, number=0)
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch

from llmtrain.config.bench import BenchConfig
from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.synthetic import BatchShape, synthetic_batch


def bench_batch(config: BenchConfig, number: int) -> StepBatch:
    """Make a global batch whose every token but the last of a document has a target of weight 1."""
    training = config.training
    shape = BatchShape(
        rows=training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
    )
    batch = synthetic_batch(shape, training.seed, number)
    documents, positions = batch.document_ids, batch.positions
    if config.documents == "whole":
        documents = torch.zeros_like(documents)
        positions = torch.arange(shape.sequence_length, dtype=torch.int32).expand_as(positions)
        positions = positions.contiguous()
    targets = torch.full_like(batch.targets, IGNORE_INDEX)
    same = documents[:, 1:] == documents[:, :-1]
    targets[:, :-1] = torch.where(same, batch.tokens[:, 1:], IGNORE_INDEX)
    return replace(
        batch, document_ids=documents, positions=positions, targets=targets,
        loss_weight=(targets >= 0).float(),
    )  # fmt: skip


def document_lengths(batches: Iterable[StepBatch]) -> dict[int, int]:
    """Count documents by length over all batches."""
    counts: Counter[int] = Counter()
    for batch in batches:
        for row in batch.document_ids:
            counts.update(torch.bincount(row).tolist())
    return dict(counts)
