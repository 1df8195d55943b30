r"""One shard of tokens in Megatron-Core's IndexedDataset format: a ``.bin`` and its ``.idx``.

The ``.bin`` holds the tokens back to back. The ``.idx`` holds, little-endian and without padding:
the magic ``MMIDIDX\0\0``, the version (uint64, 1), the dtype code (uint8), the number of sequences
and of document indices (uint64 each), then per sequence its length (int32), per sequence its byte
offset in the ``.bin`` (int64), and the first sequence of each document followed by the number of
sequences (int64). Opening a shard reads 34 bytes; nothing that grows with it is held in memory.

    shard = IndexedShard(Path("stores/wiki/part-00000"))
    shard.tokens(0, 2049)
"""

import mmap
import os
import struct
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[str, int] = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "uint16": 8,
}
"""Megatron's codes of the dtypes that can hold tokens (6 and 7 are floats)."""
VOCAB_PADDING = 128
"""Vocabularies are padded to a multiple of this before the dtype is chosen."""
UINT16_VOCAB_LIMIT = 65_500
"""Padded vocabularies below this are stored as uint16."""

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[Any]


class Header(NamedTuple):
    """The fixed part of an ``.idx`` file."""

    dtype: np.dtype[Any]
    """Type of one token in the ``.bin``."""
    num_sequences: int
    """Sequences in the shard."""
    num_documents: int
    """Documents in the shard; each holds one or more sequences."""

    @property
    def idx_bytes(self) -> int:
        """Bytes the ``.idx`` has to hold (Megatron's multimodal files append one per sequence)."""
        return HEADER.size + 12 * self.num_sequences + 8 * (self.num_documents + 1)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return uint16 where the padded vocabulary fits Megatron's limit, else int32."""
    padded = -(-vocab_size // VOCAB_PADDING) * VOCAB_PADDING
    return np.dtype("<u2") if padded < UINT16_VOCAB_LIMIT else np.dtype("<i4")


def read_header(path: Path) -> Header:
    """Read and check the first 34 bytes of an ``.idx`` file.

    Raises:
        DataError: the file is shorter, or of another format, version or dtype.
    """
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{path} does not begin with the magic of a Megatron index (found {raw[:9]!r}, "
            f"expected {MAGIC!r}); it is damaged or of another format: copy or tokenize it again"
        )
    _, version, code, num_sequences, num_indices = HEADER.unpack(raw)
    names = {value: name for name, value in DTYPE_CODES.items()}
    if version != VERSION or code not in names:
        raise DataError(
            f"{path} has version {version} and dtype code {code}; expected version {VERSION} and a "
            f"code in {sorted(names)}: write the store again with Megatron-Core or llmtrain-data"
        )
    if num_indices < 2 or num_sequences == 0:
        raise DataError(f"{path} holds no documents; leave this shard out of the store")
    dtype = np.dtype(names[code]).newbyteorder("<")
    return Header(dtype, num_sequences, num_indices - 1)


def write_index(path: Path, dtype: np.dtype[Any], sizes: Sequence[int] | Int64Array) -> None:
    """Write an ``.idx`` whose documents hold one sequence each; ``sizes`` are in tokens."""
    lengths = np.asarray(sizes, dtype=np.int64)
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    documents = np.arange(len(lengths) + 1)
    code = DTYPE_CODES[np.dtype(dtype).newbyteorder("=").name]
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write(pointers.astype("<i8").tobytes())
        file.write(documents.astype("<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())


class IndexedShard:
    """Read access to one ``.bin``/``.idx`` pair; the files are mapped on first use."""

    def __init__(self, prefix: Path) -> None:
        """Check header and sizes of ``prefix``.idx and ``prefix``.bin.

        Raises:
            DataError: a file is missing, truncated or of another format.
        """
        self.prefix = prefix
        self.bin_path = prefix.with_name(prefix.name + ".bin")
        self.idx_path = prefix.with_name(prefix.name + ".idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist; a shard is a pair of .bin and .idx files")
        self.header = read_header(self.idx_path)
        self.dtype = self.header.dtype
        found = self.idx_path.stat().st_size
        if found < self.header.idx_bytes:
            raise DataError(
                f"{self.idx_path} holds {found:,} bytes, its header asks for "
                f"{self.header.idx_bytes:,}; it is truncated: copy or tokenize it again"
            )
        self.bin_bytes = self.bin_path.stat().st_size
        self.num_tokens = self.bin_bytes // self.dtype.itemsize
        self.num_documents = self.header.num_documents
        self._data: TokenArray | None = None
        self._index: mmap.mmap | None = None

    def check_size(self) -> None:
        """Compare the size of the ``.bin`` with where the last sequence ends.

        Raises:
            DataError: the ``.bin`` is shorter or longer than its index says.
        """
        last = self.header.num_sequences - 1
        end = int(self._pointers[last]) + int(self.sequence_lengths()[last]) * self.dtype.itemsize
        if end != self.bin_bytes:
            raise DataError(
                f"{self.bin_path} holds {self.bin_bytes:,} bytes, its index says {end:,}; it is "
                "truncated or belongs to another index: copy or tokenize it again"
            )
        indices = self._document_indices
        if indices[0] != 0 or indices[self.num_documents] != self.header.num_sequences:
            raise DataError(
                f"{self.idx_path} has documents over sequences {indices[0]} to "
                f"{indices[self.num_documents]}, but {self.header.num_sequences} sequences; its "
                "writer did not end the last document: write it again"
            )

    def check_index(self) -> None:
        """Read the whole index: sequences follow each other and no document is empty.

        Raises:
            DataError: there is a gap between sequences or an empty document.
        """
        self.check_size()
        pointers, indices = self._pointers, self._document_indices
        ends = pointers + self.sequence_lengths().astype(np.int64) * self.dtype.itemsize
        if pointers[0] != 0 or (ends[:-1] != pointers[1:]).any():
            raise DataError(f"{self.idx_path} leaves gaps between sequences; write the store again")
        if (np.diff(indices) < 0).any():
            raise DataError(f"{self.idx_path} has documents out of order; write the store again")
        edges = np.append(pointers, self.bin_bytes)[indices]
        empty = np.flatnonzero(np.diff(edges) <= 0)
        if len(empty):
            raise DataError(
                f"{self.idx_path} holds {len(empty)} empty documents (the first is number "
                f"{empty[0]}); drop empty documents before the store is written"
            )

    def tokens(self, start: int, end: int) -> TokenArray:
        """Return a read-only view of the tokens [start, end) in the dtype of the store."""
        return self.data[start:end]

    @property
    def data(self) -> TokenArray:
        """All tokens of the shard as a read-only view of the mapped file."""
        if self._data is None:
            with self.bin_path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = np.frombuffer(mapped, dtype=self.dtype, count=self.num_tokens)
        return self._data

    def document_starts(self, documents: Int64Array) -> Int64Array:
        """Return the first token of each document; document ``num_documents`` starts at the end."""
        inside = documents < self.num_documents
        first = self._first_bytes(np.where(inside, documents, 0)) // self.dtype.itemsize
        return np.where(inside, first, self.num_tokens)

    def first_document_from(self, tokens: Int64Array) -> Int64Array:
        """Return, for each token, the first document that starts at or after it (lower bound).

        A bisection over the mapped index for all tokens at once: log2(documents) small reads.
        """
        offsets = tokens * self.dtype.itemsize
        found = np.zeros(len(tokens), dtype=np.int64)
        remaining = self.num_documents
        while remaining > 1:
            half = remaining // 2
            found += half * (self._first_bytes(found + (half - 1)) < offsets)
            remaining -= half
        return found + (self._first_bytes(found) < offsets)

    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Return the lengths of all sequences in tokens, as a view of the mapped file."""
        array: npt.NDArray[np.int32] = np.ndarray(
            (self.header.num_sequences,), "<i4", buffer=self._mapped_index(), offset=HEADER.size
        )
        return array

    def _first_bytes(self, documents: Int64Array) -> Int64Array:
        """Return the byte offset of the first sequence of each document."""
        if self.header.num_sequences == self.num_documents:  # then document d is sequence d
            return self._pointers[documents]
        return self._pointers[self._document_indices[documents]]

    @cached_property
    def _pointers(self) -> Int64Array:
        count = self.header.num_sequences
        offset = HEADER.size + 4 * count
        return np.ndarray((count,), "<i8", buffer=self._mapped_index(), offset=offset)

    @cached_property
    def _document_indices(self) -> Int64Array:
        offset = HEADER.size + 12 * self.header.num_sequences
        shape = (self.num_documents + 1,)
        return np.ndarray(shape, "<i8", buffer=self._mapped_index(), offset=offset)

    def _mapped_index(self) -> mmap.mmap:
        if self._index is None:
            with self.idx_path.open("rb") as file:
                self._index = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._index
