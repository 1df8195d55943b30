"""Safetensors shards that are filled in any order, so that no tensor need be whole in memory.

Sizes are known before the first byte: the headers are written, the files get their length, and
pieces of tensors are put where they belong.

Invariant: the bytes of a folder depend on the tensors alone, not on the pieces they came in; a
folder has its index, or its one file its full length, only after ``finish``.

    with ShardWriter(folder, {"model.norm.weight": (torch.bfloat16, (4096,))}, 5 * 10**9) as shards:
        shards.put("model.norm.weight", range(0, 4096), piece)
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from llmtrain.interop.safetensors import INDEX, NAMES, SINGLE

Layout = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""
_ALIGNMENT = 8
_BLOCK_VALUES = 1 << 23
"""Numbers converted at a time."""


class ShardWriter:
    """Writes named tensors into as few files of at most a given size as their order allows."""

    def __init__(self, folder: Path, tensors: Mapping[str, Layout], max_shard_bytes: int) -> None:
        """Make the files in ``folder``, which exists; a larger tensor has a file of its own."""
        self.folder = folder
        self._tensors = dict(tensors)
        parts = split(tensors, max_shard_bytes)
        names = [SINGLE] if len(parts) == 1 else [
            f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            for number in range(1, len(parts) + 1)
        ]  # fmt: skip
        self._file_of = {t: name for name, part in zip(names, parts, strict=True) for t in part}
        self._offsets: dict[str, int] = {}
        self._files: dict[str, int] = {}
        for name, part in zip(names, parts, strict=True):
            self._files[name] = self._open(name, part)

    def put(self, name: str, rows: Sequence[int], values: Tensor, column: int = 0) -> None:
        """Write ``values`` [len(rows), ...] as the given rows of a tensor, from ``column`` on.

        A tensor counts as rows (its first dim) of columns (all others).
        """
        dtype, shape = self._tensors[name]
        width = math.prod(shape[1:])
        flat = values.reshape(len(rows), -1)
        file, start = self._files[self._file_of[name]], self._offsets[name]
        most = max(1, _BLOCK_VALUES // width) if flat.shape[1] == width else 1
        for first, count in _runs(rows, most):
            part = flat[first : first + count].to(dtype).contiguous()
            place = start + (rows[first] * width + column) * dtype.itemsize
            _write_at(file, part.view(-1).view(torch.uint8).numpy().data, place)

    def finish(self) -> None:
        """Write the index, where there are several files, and have the disk keep everything."""
        for file in self._files.values():
            os.fsync(file)
        if len(self._files) > 1:
            total = sum(size_of(layout) for layout in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        try:
            if kind is None:
                self.finish()
        finally:
            for file in self._files.values():
                os.close(file)

    def _open(self, name: str, part: Iterable[str]) -> int:
        """Make one file of its full length, the header in it."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        places: dict[str, int] = {}
        for tensor in part:
            dtype, shape = self._tensors[tensor]
            places[tensor], end = end, end + size_of((dtype, shape))
            header[tensor] = {
                "dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [places[tensor], end]
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        start = _ALIGNMENT + len(text)
        self._offsets |= {tensor: start + place for tensor, place in places.items()}
        file = os.open(self.folder / name, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        _write_at(file, memoryview(len(text).to_bytes(_ALIGNMENT, "little") + text), 0)
        os.ftruncate(file, start + end)
        return file


def split(tensors: Mapping[str, Layout], max_shard_bytes: int) -> list[list[str]]:
    """Cut the tensors, in their order, into parts of at most ``max_shard_bytes``."""
    parts: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, layout in tensors.items():
        size = size_of(layout)
        if size > room and parts[-1]:
            parts.append([])
            room = max_shard_bytes
        parts[-1].append(name)
        room -= size
    return parts


def size_of(layout: Layout) -> int:
    """Bytes of a tensor."""
    dtype, shape = layout
    return math.prod(shape) * dtype.itemsize


def _runs(rows: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into runs of at most ``most`` that follow each other: (first position, how many)."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or i - first == most or rows[i] != rows[i - 1] + 1:
            yield first, i - first
            first = i


def _write_at(file: int, content: memoryview, place: int) -> None:
    """Write all of ``content``; a call may take less than it was given."""
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], place + done)
