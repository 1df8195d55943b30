"""The model weights of a checkpoint, in and out a piece at a time.

What a checkpoint stores is one piece for each rectangle a rank held; a reader here holds one piece,
a writer the rows it was given last, so that neither needs room for the model.

    stored = StoredWeights(archive.locate(Path("runs/demo")).path)
    for offsets, piece in stored.pieces("model.norm.weight"): ...
    write_weights(RunDirectory(path).checkpoints, tensors, carried={})
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from llmtrain.checkpoint import archive, tensor_files
from llmtrain.checkpoint.restore import MODEL_PREFIX
from llmtrain.errors import CheckpointError

_FILE = "__0_0.distcp"
PIECE_BYTES = 1 << 26
"""Most bytes of a piece that is written here."""


class StoredWeights:
    """The weights of one checkpoint whose files are known to be as they were written."""

    def __init__(self, path: Path) -> None:
        """Read the index of the checkpoint folder ``path``."""
        self.path = path
        self._reader = FileSystemReader(path)
        metadata = self._reader.read_metadata()
        self._places: Mapping[Any, Any] = metadata.storage_data or {}
        self._tensors = {
            name.removeprefix(MODEL_PREFIX): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(MODEL_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type of every parameter."""
        return {name: entry.properties.dtype for name, entry in self._tensors.items()}

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield the rectangles a parameter was stored in, with the place of their first element.

        Raises:
            CheckpointError: the file cannot be read.
        """
        for chunk in self._tensors[name].chunks:
            place = self._places[MetadataIndex(MODEL_PREFIX + name, chunk.offsets)]
            try:
                with (self.path / place.relative_path).open("rb") as file:
                    part = self._reader._slice_file(file, place)  # as read_data does
                    piece: Tensor = torch.load(part, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{self.path} cannot be read: {error}") from error
            yield tuple(chunk.offsets), piece


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWeight:
    """A parameter that is made while it is written."""

    name: str
    """Its global name."""
    shape: tuple[int, ...]
    """Its whole shape."""
    dtype: torch.dtype
    """Type it is stored in."""
    rows: Callable[[int, int], Tensor]
    """Makes rows ``start`` to ``stop`` in that type."""
    whole: bool = False
    """Whether it is made in one piece, however large."""


def row_ranges(
    shape: tuple[int, ...], dtype: torch.dtype, whole: bool = False
) -> Iterator[tuple[int, int]]:
    """Cut the rows of a tensor into ranges of at most ``PIECE_BYTES``, or of one row, or not."""
    row = math.prod(shape[1:]) * dtype.itemsize
    step = shape[0] if whole else max(1, PIECE_BYTES // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def write_weights(
    directory: Path, weights: Sequence[NewWeight], *, carried: Mapping[str, Any]
) -> Path:
    """Write a checkpoint of step 0 that holds weights and nothing else; returns its folder.

    ``carried`` is what readers of its ``meta.json`` find. Runs start from it
    (``checkpoint.start_from``); none resumes from it, for it has no optimizer state.

    Raises:
        CheckpointError: what makes a weight refused.
        OSError: it could not be written.
    """
    makers = {MODEL_PREFIX + weight.name: weight for weight in weights}
    aside = archive.fresh_aside(directory, 0)
    items = [item for name, weight in makers.items() for item in _items(name, weight)]
    plan = SavePlan(items, planner_data={})
    (chosen,), metadata = tensor_files.share_out([plan])
    file = tensor_files.place(chosen, _FILE)
    values = (_make(makers[piece.index.fqn], piece) for piece in file.pieces)
    files = {_FILE: tensor_files.write(aside / _FILE, file.pieces, values)}
    index = tensor_files.index_file(metadata, [file.entries])
    files[tensor_files.INDEX] = tensor_files.write_bytes(aside / tensor_files.INDEX, [index])
    fields = {
        "step": 0, "tokens": 0, "facts": {}, "journal": {}, "carried": dict(carried),
        "world_size": 1, "torch": torch.__version__,
    }  # fmt: skip
    return archive.commit(aside, fields, files)


def _make(weight: NewWeight, piece: tensor_files.Piece) -> Tensor:
    """Make the values of one piece."""
    start = 0 if piece.index.offset is None else piece.index.offset[0]
    return weight.rows(start, start + piece.shape[0]).contiguous()


def _items(name: str, weight: NewWeight) -> Iterator[WriteItem]:
    """List the pieces of a weight, for torch's planner."""
    rest = weight.shape[1:]
    for start, stop in row_ranges(weight.shape, weight.dtype, weight.whole):
        chunk = ChunkStorageMetadata(
            offsets=torch.Size((start, *(0 for _ in rest))),
            sizes=torch.Size((stop - start, *rest)),
        )
        yield WriteItem(
            index=MetadataIndex(name, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk,
                properties=TensorProperties(dtype=weight.dtype),
                size=torch.Size(weight.shape),
            ),
        )
