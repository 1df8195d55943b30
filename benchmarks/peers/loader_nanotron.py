"""Loading as nanotron does it, as a side of the loader benchmark.

nanotron's release on the package index has no Nanoset; its repository's Nanoset
(huggingface/nanotron, src/nanotron/data/nanoset.py) picks windows of ``DatatroveFolderDataset`` by
two shuffled index arrays. Here datatrove's dataset reads the same bytes (its ``.ds`` files are bare
tokens), two index arrays choose, and a collator splits windows into inputs and labels.

    python benchmarks/peers/loader_nanotron.py < requests.jsonl
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datatrove.utils.dataset import DatatroveFolderDataset
from loader_side import answer_as
from torch.utils.data import DataLoader, Dataset


class Mixed(Dataset[dict[str, torch.Tensor]]):
    """Windows of several folders in the order of two index arrays."""

    def __init__(
        self, folders: list[DatatroveFolderDataset], shares: list[float], num_windows: int
    ) -> None:
        self._folders = folders
        rng = np.random.RandomState(1)
        self._folder_of = rng.choice(len(folders), num_windows, p=shares)
        self._window_of = np.empty(num_windows, dtype=np.int64)
        for number, folder in enumerate(folders):
            (places,) = np.nonzero(self._folder_of == number)
            self._window_of[places] = rng.permutation(np.arange(len(places)) % len(folder))

    def __len__(self) -> int:
        return len(self._folder_of)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        sample: dict[str, torch.Tensor] = self._folders[self._folder_of[number]][
            int(self._window_of[number])
        ]
        return sample


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
    """Return inputs, labels and their masks."""
    tokens = np.vstack([sample["input_ids"] for sample in samples])
    mask = np.ones((len(tokens), tokens.shape[1] - 1), dtype=np.bool_)
    return {
        "input_ids": tokens[:, :-1], "input_mask": mask,
        "label_ids": tokens[:, 1:], "label_mask": mask.copy(),
    }  # fmt: skip


def batches(
    sources: Mapping[str, Mapping[str, Any]], sequence_length: int, batch_size: int,
    num_batches: int, scratch: str,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    """Inputs, labels and masks."""
    folders, shares = [], []
    for name, source in sources.items():
        folder = Path(scratch) / "nanotron" / name
        folder.mkdir(parents=True, exist_ok=True)
        for prefix, _ in source["shards"]:
            link = folder / f"{Path(prefix).name}.ds"
            if not link.is_symlink():
                os.symlink(f"{prefix}.bin", link)
        folders.append(
            DatatroveFolderDataset(
                str(folder), sequence_length, filename_pattern="*.ds", recursive=False, shuffle=True
            )
        )
        shares.append(source["share"])
    mixed = Mixed(folders, shares, num_batches * batch_size)
    return iter(DataLoader(mixed, batch_size=batch_size, collate_fn=collate, drop_last=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer_as(batches, lambda batch: list(batch["input_ids"].shape))
