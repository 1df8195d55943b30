"""Grain as a side of the loader benchmark.

Its random-access source is a memory map of the same files, the cheapest there is; order, mixture
and batches are Grain's. Read in this process without read-ahead threads, which only add to the
processor time.

    python benchmarks/peers/loader_grain.py < requests.jsonl
"""

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from loader_side import answer_as, prefixes


class Windows:
    """Windows of one file by number."""

    def __init__(self, prefix: str, sequence_length: int) -> None:
        self._tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
        self._length = sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, number: int) -> np.ndarray:
        start = number * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int64)

    def __repr__(self) -> str:
        return "windows"


def split(window: np.ndarray) -> dict[str, np.ndarray]:
    """Return inputs and targets."""
    return {"inputs": window[:-1], "targets": window[1:]}


def batches(
    sources: Mapping[str, Mapping[str, Any]], sequence_length: int, batch_size: int,
    num_batches: int, scratch: str,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """Inputs and targets."""
    parts, shares = [], []
    for seed, (prefix, share) in enumerate(prefixes(sources)):
        source = grain.MapDataset.source(Windows(prefix, sequence_length))
        parts.append(source.seed(seed).shuffle().repeat())
        shares.append(share)
    mixed = grain.MapDataset.mix(parts, weights=shares).map(split).batch(batch_size)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(mixed.to_iter_dataset(options))


if __name__ == "__main__":
    answer_as(batches, lambda batch: list(batch["inputs"].shape))
