"""Which rank writes which tensor where, in the files of torch's Distributed Checkpoint.

The plan of a run's checkpoints is made once: who writes a tensor that several ranks hold, at which
byte, and the index (``.metadata``) of it all. Every save of the run then only moves values.

Invariant: a written folder is what ``torch.distributed.checkpoint.save`` would have written, bit
for bit in values; checksums inside torch's own container are left to ``meta.json``.

    mine = own_items(state, coordinator=True)              # on every rank
    chosen, index = share_out([mine, ...])                 # on the first rank
    plan = place(chosen[rank], "__0_0.distcp")             # on every rank
    content = index_file(index, [plan.entries, ...])       # on the first rank
    write(folder / plan.name, plan.pieces, values)         # at every save
"""

import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import find_state_dict_object

from llmtrain.data.manifest import sync

INDEX = ".metadata"
"""Name of the index that says where every tensor is."""
_CHUNK_BYTES = 1 << 22

Entry = tuple[MetadataIndex, _StorageInfo]
"""A rectangle of a tensor and where it lies."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One rectangle of a tensor in the file of a rank."""

    index: MetadataIndex
    """Name of the tensor and offset of the rectangle in it."""
    shape: torch.Size
    """Of the rectangle."""
    dtype: torch.dtype
    """In the file."""
    before: bytes
    """What stands in the file before its values."""
    after: bytes
    """What stands in the file after its values."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def source(self, state: Mapping[str, Tensor]) -> Tensor:
        """The values in ``state``, which may have another dtype."""
        found: Tensor = find_state_dict_object(cast(dict[str, Any], state), self.index)
        return found.detach()

    def on_host(self, state: Mapping[str, Tensor]) -> Tensor:
        """The values as the file has them, in host memory; shared with ``state`` where they can."""
        return self.source(state).to("cpu", self.dtype).contiguous()


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank writes."""

    name: str
    """Name of its file."""
    pieces: tuple[Piece, ...]
    """In the order of the file."""
    entries: tuple[Entry, ...]
    """Where they lie, for the index."""


def own_items(state: Mapping[str, Tensor], coordinator: bool) -> SavePlan:
    """List what this rank could write of its ``state``."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(dict(state), is_coordinator=coordinator)
    return planner.create_local_plan()


def own_rectangles(
    state: Mapping[str, Tensor],
) -> Iterator[tuple[tuple[str, tuple[int, ...]], Tensor]]:
    """Give every rectangle this rank holds: name of the tensor and offset in it, and the values."""
    for item in own_items(state, True).items:
        values: Tensor = find_state_dict_object(cast(dict[str, Any], state), item.index)
        yield (item.index.fqn, tuple(item.index.offset or ())), values.detach()


def share_out(plans: Sequence[SavePlan]) -> tuple[list[Sequence[WriteItem]], Metadata]:
    """Give each rectangle to one of its holders, so that all write about as much.

    Raises:
        ValueError: rectangles of a tensor overlap or leave a gap.
    """
    chosen, metadata = DefaultSavePlanner().create_global_plan(list(plans))
    return [list(plan.items) for plan in chosen], metadata


def place(items: Sequence[WriteItem], name: str) -> RankFile:
    """Lay rectangles one after the other into the file ``name``."""
    frames: dict[tuple[torch.Size, torch.dtype], tuple[bytes, bytes]] = {}
    pieces, entries, offset = [], [], 0
    for item in items:
        if item.tensor_data is None or item.type is WriteItemType.BYTE_IO:
            raise TypeError(f"{item.index.fqn} is no tensor; a checkpoint holds tensors alone")
        shape, dtype = item.tensor_data.chunk.sizes, item.tensor_data.properties.dtype
        if (shape, dtype) not in frames:
            frames[shape, dtype] = _frame(shape, dtype)
        piece = Piece(item.index, shape, dtype, *frames[shape, dtype])
        length = len(piece.before) + piece.num_bytes + len(piece.after)
        pieces.append(piece)
        entries.append((item.index, _StorageInfo(name, offset, length)))
        offset += length
    return RankFile(name, tuple(pieces), tuple(entries))


def index_file(metadata: Metadata, entries: Iterable[Iterable[Entry]]) -> bytes:
    """Return the content of the index, of the entries of all ranks."""
    metadata.storage_data = dict(entry for part in entries for entry in part)
    metadata.storage_meta = StorageMeta()
    metadata.version = CURRENT_DCP_VERSION
    return pickle.dumps(metadata)


def write(path: Path, pieces: Sequence[Piece], values: Iterable[Tensor]) -> dict[str, Any]:
    """Write and sync the file of a rank; gives its size and blake3, taken on the way.

    ``values`` are contiguous host tensors of the pieces' shapes and dtypes, in their order.

    Raises:
        OSError: it could not be written; what was, is deleted.
    """

    def parts() -> Iterable[bytes | memoryview]:
        for piece, value in zip(pieces, values, strict=True):
            yield piece.before
            yield value.reshape(-1).view(torch.uint8).numpy().data
            yield piece.after

    return write_bytes(path, parts())


def write_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a file; gives its size and blake3.

    Raises:
        OSError: it could not be written; what was, is deleted.
    """
    digest, size = blake3(), 0
    try:
        with path.open("wb", buffering=1 << 16) as file:
            for part in parts:
                for start in range(0, len(part), _CHUNK_BYTES):
                    chunk = part[start : start + _CHUNK_BYTES]
                    digest.update(chunk)
                    file.write(chunk)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return {"bytes": size, "blake3": digest.hexdigest()}


def _frame(shape: torch.Size, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What ``torch.save`` puts before and after the values of a tensor.

    Without its checksums of 32 bits it depends on shape and dtype alone; the values are not read.
    """
    tensor = torch.empty(shape, dtype=dtype)
    split = _Split(tensor.data_ptr())
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, cast(IO[bytes], split))
    finally:
        torch.serialization.set_crc32_options(checksums)
    if split.length != tensor.nbytes:
        raise RuntimeError(
            f"torch {torch.__version__} wrote {split.length} bytes of values where a tensor has "
            f"{tensor.nbytes}; report this with the version"
        )
    return bytes(split.before), bytes(split.after)


class _Split:
    """A file that keeps what is written around the memory of a tensor, not the memory itself."""

    def __init__(self, address: int) -> None:
        self._address = address
        self.before, self.after = bytearray(), bytearray()
        self.length = 0

    def write(self, part: Any) -> int:
        view = memoryview(part).cast("B")
        if view and np.asarray(view).ctypes.data == self._address + self.length:
            self.length += len(view)
        else:
            (self.after if self.length else self.before).extend(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""
