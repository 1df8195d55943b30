"""Folders of safetensors files, read and written some rows at a time.

The format is 8 bytes of length, a JSON header with type, shape and place of every tensor, and the
tensors end to end. Files are read and written here and not by the safetensors package because that
maps whole shards into memory and writes only what is in memory all at once.

Invariant: a reader holds the rows it was asked for and nothing else. Whatever is cut short, missing
or named twice is found when the folder is opened, before a tensor is read.

    folder = TensorFolder(Path("llama"))
    folder.tensors["model.norm.weight"].shape
    folder.rows("model.embed_tokens.weight", 0, 100)     # [100, D]
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""Types of the numbers in a file that are weights as they stand."""
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor stands."""

    path: Path
    """Its file."""
    dtype: torch.dtype
    """Type of its numbers."""
    shape: tuple[int, ...]
    """Its dims."""
    offset: int
    """First byte in the file."""

    @property
    def row_values(self) -> int:
        """Numbers in one step of the first dim."""
        return math.prod(self.shape[1:])


class TensorFolder:
    """The tensors of one ``model.safetensors``, or of the shards that an index names."""

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        """Read the headers of all files; ``single`` is the one file where there is no index.

        Raises:
            CheckpointError: a file is missing or cut short, or index and files differ.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        index = _read_index(folder, single)
        for name in sorted(set(index.values())) if index else [single]:
            for tensor, stored in _read_header(folder / name).items():
                if tensor in self.tensors:
                    raise CheckpointError(
                        f"{folder} holds {tensor} twice, in {self.tensors[tensor].path.name} and "
                        f"in {name}; download the folder again"
                    )
                self.tensors[tensor] = stored
        for tensor, name in index.items():
            if tensor not in self.tensors:
                raise CheckpointError(
                    f"{folder / INDEX} names {tensor} in {name}, which does not hold it; "
                    f"download {name} again"
                )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` of a tensor; a scalar has one row.

        Raises:
            CheckpointError: the file cannot be read.
        """
        stored = self.tensors[name]
        values = (stop - start) * stored.row_values
        buffer = bytearray(values * stored.dtype.itemsize)
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset + start * stored.row_values * stored.dtype.itemsize)
                view, read = memoryview(buffer), 0
                while read < len(buffer) and (count := file.readinto(view[read:])):
                    read += count
        except OSError as error:
            raise CheckpointError(f"{stored.path} cannot be read: {error}") from error
        if read < len(buffer):
            raise CheckpointError(f"{stored.path} ends inside {name}; download it again")
        if not values:
            return torch.empty(stop - start, *stored.shape[1:], dtype=stored.dtype)
        return torch.frombuffer(buffer, dtype=stored.dtype).view(stop - start, *stored.shape[1:])


def _read_index(folder: Path, single: str) -> dict[str, str]:
    """File by tensor; empty where the folder holds one file and no index."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder; give one with config.json and {single} or {INDEX}"
        )
    path = folder / INDEX
    if not path.is_file():
        if (folder / single).is_file():
            return {}
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        hint = (
            f"it holds {pickled[0].name}, a pickle: save it anew with safe_serialization=True"
            if pickled else "download the weights"
        )  # fmt: skip
        raise CheckpointError(f"{folder} has neither {single} nor {INDEX}; {hint}")
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    return {str(tensor): str(name) for tensor, name in found.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing or holds no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download it into the folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object; download it again")
    return found


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of one file stand, and check that the file holds them all."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(_LONGEST_HEADER, size - _LENGTH_BYTES):
                raise CheckpointError(
                    f"{path} of {size:,} bytes is no safetensors file, or cut inside its header; "
                    "download it again"
                )
            header = json.loads(file.read(length))
        start = _LENGTH_BYTES + length
        found = {
            str(name): _stored(path, str(name), entry, start, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download it into the folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has no safetensors header ({error!r})") from None
    return found


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int, size: int) -> StoredTensor:
    """One line of a header, checked against the file's ``size``."""
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if dtype is None:
        raise CheckpointError(
            f"{path.name} holds {name} as {entry['dtype']}, weights must be one of "
            f"{', '.join(DTYPES)}; a quantized checkpoint has to be expanded first"
        )
    if end - begin != math.prod(shape) * dtype.itemsize or begin < 0 or min(shape, default=0) < 0:
        raise CheckpointError(
            f"{path} gives {name} of shape {list(shape)} {end - begin:,} bytes, expected "
            f"{math.prod(shape) * dtype.itemsize:,}; download it again"
        )
    if start + end > size:
        raise CheckpointError(
            f"{path} is cut: it has {size:,} bytes and {name} ends at {start + end:,}; "
            "download it again"
        )
    return StoredTensor(path, dtype, shape, start + begin)
