"""The project's own loader, and a bare memory map, as sides of the loader benchmark.

python benchmarks/peers/loader_own.py ours < requests.jsonl
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_side import answer_as, prefixes

sys.path.append(str(Path(__file__).resolve().parents[2]))

from llmtrain.config.mixture import ConstantMixture
from llmtrain.config.ramp import StepSchedule
from llmtrain.data.batch import StepBatch
from llmtrain.data.loader import Batches
from llmtrain.data.mixture import Mixture
from llmtrain.data.order import ConcatOrder
from llmtrain.data.plan import BatchPlan
from llmtrain.data.shares import share_schedule
from llmtrain.data.store import open_source

Sources = Mapping[str, Mapping[str, Any]]


def ours(
    sources: Sources, sequence_length: int, batch_size: int, num_batches: int, scratch: str
) -> Iterator[StepBatch]:
    """Every field of a step: inputs, targets, positions, document ids, weights, sources."""
    stores = {name: open_source(source["store"]) for name, source in sources.items()}
    orders = {
        name: ConcatOrder(store, name, seed=1, window_tokens=sequence_length)
        for name, store in stores.items()
    }
    tokens = batch_size * sequence_length
    shares = share_schedule(
        ConstantMixture(weights={name: source["share"] for name, source in sources.items()}),
        {name: order.num_windows for name, order in orders.items()},
        unit_tokens=sequence_length, num_tokens=num_batches * tokens,
    )  # fmt: skip
    plan = BatchPlan(orders, Mixture(shares), StepSchedule(sequence_length, tokens, (), ()), seed=1)
    with Batches(plan, micro_batch_size=1, prefetch=2) as batches:
        for step in range(num_batches):
            yield batches.at(step)


def raw(
    sources: Sources, sequence_length: int, batch_size: int, num_batches: int, scratch: str
) -> Iterator[np.ndarray]:
    """Windows at random places of mapped files, copied to int64; nothing else."""
    maps = [np.memmap(f"{path}.bin", dtype=np.uint16, mode="r") for path, _ in prefixes(sources)]
    shares = np.array([share for _, share in prefixes(sources)])
    room = np.array([len(mapped) - sequence_length for mapped in maps])
    rng = np.random.default_rng(1)
    for _ in range(num_batches):
        batch = np.empty((batch_size, sequence_length + 1), dtype=np.int64)
        chosen = rng.choice(len(maps), batch_size, p=shares / shares.sum())
        starts = rng.integers(0, room[chosen])
        for row, (number, start) in enumerate(zip(chosen.tolist(), starts.tolist(), strict=True)):
            batch[row] = maps[number][start : start + sequence_length + 1]
        yield batch


def by_hand(
    sources: Sources, sequence_length: int, batch_size: int, num_batches: int, scratch: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same as most short training scripts have it: two stacks of converted slices."""
    maps = [np.memmap(f"{path}.bin", dtype=np.uint16, mode="r") for path, _ in prefixes(sources)]
    shares = np.array([share for _, share in prefixes(sources)])
    rng = np.random.default_rng(1)
    for _ in range(num_batches):
        rows = []
        for number in rng.choice(len(maps), batch_size, p=shares / shares.sum()).tolist():
            start = int(rng.integers(0, len(maps[number]) - sequence_length))
            window = maps[number][start : start + sequence_length + 1].astype(np.int64)
            rows.append(torch.from_numpy(window))
        yield (
            torch.stack([row[:-1] for row in rows]),
            torch.stack([row[1:] for row in rows]),
        )


SIDES = {
    "ours": (ours, lambda batch: list(batch.tokens.shape)),
    "raw": (raw, lambda batch: list(batch[:, 1:].shape)),
    "by_hand": (by_hand, lambda batch: list(batch[0].shape)),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    answer_as(*SIDES[sys.argv[1]])
