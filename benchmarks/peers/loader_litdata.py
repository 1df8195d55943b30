"""litdata as a side of the loader benchmark.

The tokens of every shard are written once in its own format with its own writer, as its
documentation does for pretraining; StreamingDataset with TokensLoader reads them, a
CombinedStreamingDataset mixes them, StreamingDataLoader makes batches in this process.

    python benchmarks/peers/loader_litdata.py < requests.jsonl
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming.cache import Cache
from loader_side import answer_as, prefixes

CHUNK_BYTES = "64MB"
PIECE_TOKENS = 1 << 20


def converted(prefix: str, sequence_length: int, scratch: str) -> str:
    """Return the folder of a shard in litdata's format, written unless it is there."""
    name = "-".join(Path(prefix).parts[-2:])
    folder = f"{scratch}/litdata/{name}"
    if os.path.isfile(f"{folder}/index.json"):
        return folder
    os.makedirs(folder, exist_ok=True)
    block = sequence_length + 1
    cache = Cache(folder, chunk_bytes=CHUNK_BYTES, item_loader=TokensLoader(block))
    tokens = np.memmap(f"{prefix}.bin", dtype=np.uint16, mode="r")
    for number, start in enumerate(range(0, len(tokens), PIECE_TOKENS)):
        cache[number] = torch.from_numpy(tokens[start : start + PIECE_TOKENS].astype(np.uint16))
    cache.done()
    cache.merge()
    return folder


def batches(
    sources: Mapping[str, Mapping[str, Any]], sequence_length: int, batch_size: int,
    num_batches: int, scratch: str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Inputs and targets."""
    parts, shares = [], []
    for prefix, share in prefixes(sources):
        folder = converted(prefix, sequence_length, scratch)
        loader = TokensLoader(sequence_length + 1)
        parts.append(StreamingDataset(folder, item_loader=loader, shuffle=True, drop_last=True))
        shares.append(share)
    mixed = CombinedStreamingDataset(parts, seed=1, weights=shares, iterate_over_all=False)
    while True:
        for windows in StreamingDataLoader(mixed, batch_size=batch_size, num_workers=0):
            tokens = windows.long()
            yield tokens[:, :-1], tokens[:, 1:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer_as(batches, lambda batch: list(batch[0].shape))
