r"""One shard of tokens in Megatron-Core's IndexedDataset format: a ``.bin`` and its ``.idx``.

The ``.bin`` holds the tokens back to back. The ``.idx`` holds, little-endian and without padding:
the magic ``MMIDIDX\0\0``, the version (uint64, 1), the dtype code (uint8), the number of sequences
and of document indices (uint64 each), then per sequence its length (int32), per sequence its byte
offset in the ``.bin`` (int64), and the first sequence of each document followed by the number of
sequences (int64). Opening a shard reads its header and 64 KiB at the ends of both files; nothing
that grows with it is held in memory.

    folder = LocalFolder(Path("stores/wiki"))
    shard = IndexedShard(folder.file("part-00000.bin", 4_098), folder.file("part-00000.idx", 62))
    shard.tokens(0, 2049)
"""

import os
import struct
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import blake3
import numpy as np
import numpy.typing as npt

from llmtrain.data.files import StoreFile
from llmtrain.data.roles import ANSWER, ENDING, RoleArray
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
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in DTYPE_CODES.items()}
VOCAB_PADDING = 128
"""Vocabularies are padded to a multiple of this before the dtype is chosen."""
UINT16_VOCAB_LIMIT = 65_500
"""Padded vocabularies below this are stored as uint16."""
END_BYTES = 1 << 16
"""Bytes at either end of a file that are compared with the manifest before its first use."""

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


def read_header(file: StoreFile) -> Header:
    """Read and check the first 34 bytes of an ``.idx`` file.

    Raises:
        DataError: the file is shorter than its header asks, or of another format, version or dtype.
    """
    header = parse_header(file.read(0, min(file.size, HEADER.size)), file.name)
    if file.size < header.idx_bytes:
        raise DataError(
            f"{file.name} holds {file.size:,} bytes, its header asks for {header.idx_bytes:,}; it "
            "is truncated: copy or tokenize it again"
        )
    return header


def parse_header(raw: bytes, name: str) -> Header:
    """Check the first 34 bytes of the ``.idx`` file ``name``.

    Raises:
        DataError: they are of another format, version or dtype.
    """
    if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise DataError(
            f"{name} does not begin with the magic of a Megatron index (found {raw[:9]!r}, "
            f"expected {MAGIC!r}); it is damaged or of another format: copy or tokenize it again"
        )
    _, version, code, num_sequences, num_indices = HEADER.unpack(raw)
    if version != VERSION or code not in _DTYPES:
        raise DataError(
            f"{name} has version {version} and dtype code {code}; expected version {VERSION} and a "
            f"code in {sorted(_DTYPES)}: write the store again with Megatron-Core or llmtrain-data"
        )
    if num_indices < 2 or num_sequences == 0:
        raise DataError(f"{name} holds no documents; leave this shard out of the store")
    return Header(_DTYPES[code], num_sequences, num_indices - 1)


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


class Known(NamedTuple):
    """What a manifest says of a shard; a shard opened with it is read only when it is used."""

    dtype: np.dtype[Any]
    """Type of one token."""
    num_tokens: int
    """Tokens."""
    num_documents: int
    """Documents."""
    ends: Mapping[str, str]
    """``ends_digest`` by ending; empty in stores written before there was one."""


def ends_digest(file: StoreFile) -> str:
    """Hash the first and the last 64 KiB of a file: cheap enough to tell a swapped file at once."""
    digest = blake3.blake3(file.size.to_bytes(8, "little"))
    digest.update(file.read(0, min(file.size, END_BYTES)))
    digest.update(file.read(max(0, file.size - END_BYTES), file.size))
    return str(digest.hexdigest(length=16))


class IndexedShard:
    """Read access to one ``.bin``/``.idx`` pair; the files are mapped on first use."""

    def __init__(
        self,
        bin_file: StoreFile,
        idx_file: StoreFile,
        known: Known | None = None,
        roles_file: StoreFile | None = None,
    ) -> None:
        """Read the header now; where ``known`` says what it holds, on first use.

        Raises:
            DataError: without ``known``, what ``header`` raises.
        """
        self.bin_file = bin_file
        self.idx_file = idx_file
        self.roles_file = roles_file
        self._known = known
        if known is None:
            self.dtype, self.num_documents = self.header.dtype, self.header.num_documents
            self.num_tokens = bin_file.size // self.dtype.itemsize
        else:
            self.dtype, self.num_tokens, self.num_documents, _ = known

    @property
    def name(self) -> str:
        """Path or address of the pair, without the endings."""
        return self.bin_file.name.removesuffix(".bin")

    @cached_property
    def header(self) -> Header:
        """The checked header; asking for it is what opens a shard.

        Raises:
            DataError: a file is damaged, truncated, of another format or another shard's.
        """
        header = read_header(self.idx_file)
        if self._known is not None:
            self.check_header(header)
            self.check_ends()
        return header

    def check_ends(self) -> None:
        """Compare the first and the last 64 KiB of its files with the manifest.

        Raises:
            DataError: they differ.
        """
        ends = {} if self._known is None else self._known.ends
        files = {"bin": self.bin_file, "idx": self.idx_file, ENDING: self.roles_file}
        for end, file in files.items():
            if file is not None and end in ends and ends_digest(file) != ends[end]:
                raise DataError(
                    f"{file.name} is not the file its manifest lists: its first and last "
                    f"{END_BYTES >> 10} KiB differ, though its size is right; another shard "
                    "was put in its place or it is damaged: restore it or write the store again"
                )

    def check_header(self, header: Header) -> None:
        """Compare a header with the manifest.

        Raises:
            DataError: they differ.
        """
        known = self._known
        if known is None:
            return
        tokens = self.bin_file.size // header.dtype.itemsize
        if (header.dtype, tokens, header.num_documents) != known[:3]:
            found = (_dtype_name(header.dtype), tokens, header.num_documents)
            expected = (_dtype_name(known.dtype), known.num_tokens, known.num_documents)
            raise DataError(
                f"{self.idx_file.name} has (dtype, tokens, documents) {found}, its manifest says "
                f"{expected}; files of two stores are mixed: write the store again"
            )

    def check_size(self) -> None:
        """Compare the size of the ``.bin`` with where the last sequence ends.

        Raises:
            DataError: the ``.bin`` is shorter or longer than its index says.
        """
        last = self.header.num_sequences - 1
        end = int(self._pointers[last]) + int(self.sequence_lengths()[last]) * self.dtype.itemsize
        if end != self.bin_file.size:
            raise DataError(
                f"{self.bin_file.name} holds {self.bin_file.size:,} bytes, its index says {end:,}; "
                "it is truncated or belongs to another index: copy or tokenize it again"
            )
        indices = self._document_indices
        if indices[0] != 0 or indices[self.num_documents] != self.header.num_sequences:
            raise DataError(
                f"{self.idx_file.name} has documents over sequences {indices[0]} to "
                f"{indices[self.num_documents]}, but {self.header.num_sequences} sequences; its "
                "writer did not end the last document: write it again"
            )

    def check_index(self) -> None:
        """Read the whole index: sequences follow each other and no document is empty.

        Raises:
            DataError: there is a gap between sequences or an empty document.
        """
        self.check_size()
        name, pointers, indices = self.idx_file.name, self._pointers, self._document_indices
        ends = pointers + self.sequence_lengths().astype(np.int64) * self.dtype.itemsize
        if pointers[0] != 0 or (ends[:-1] != pointers[1:]).any():
            raise DataError(f"{name} leaves gaps between sequences; write the store again")
        if (np.diff(indices) < 0).any():
            raise DataError(f"{name} has documents out of order; write the store again")
        edges = np.append(pointers, self.bin_file.size)[indices]
        empty = np.flatnonzero(np.diff(edges) <= 0)
        if len(empty):
            raise DataError(
                f"{name} holds {len(empty)} empty documents (the first is number {empty[0]}); drop "
                "empty documents before the store is written"
            )

    def tokens(self, start: int, end: int) -> TokenArray:
        """Return a read-only view of the tokens [start, end) in the dtype of the store."""
        self.bin_file.need(*self.byte_span(start, end))
        return self.data[start:end]

    def roles(self, start: int, end: int) -> RoleArray:
        """Return the roles of the tokens [start, end); a shard without has ANSWER everywhere."""
        if self.roles_file is None:
            return np.full(end - start, ANSWER, dtype=np.uint8)
        self.roles_file.need(start, end)
        return self._all_roles[start:end]

    def byte_span(self, start: int, end: int) -> tuple[int, int]:
        """Return where the tokens [start, end) are in the ``.bin``."""
        return start * self.dtype.itemsize, end * self.dtype.itemsize

    @cached_property
    def data(self) -> TokenArray:
        """All tokens as a read-only view; of a fetched file, those ``bin_file.need`` was told."""
        return np.frombuffer(self.bin_file.view(), dtype=self.header.dtype, count=self.num_tokens)

    @cached_property
    def _all_roles(self) -> RoleArray:
        if self.roles_file is None or len(self.data) != self.roles_file.size:
            raise DataError(
                f"{self.name}.{ENDING} does not hold a byte for each of {self.num_tokens:,} "
                "tokens; it belongs to another shard: restore it or write the store again"
            )
        return np.frombuffer(self.roles_file.view(), dtype=np.uint8)

    def document_starts(self, documents: Int64Array) -> Int64Array:
        """Return the first token of each document; document ``num_documents`` starts at the end."""
        inside = documents < self.num_documents
        places = np.where(inside, documents, 0)
        if self.header.num_sequences != self.num_documents:  # else document d is sequence d
            places = self._document_indices[places]
        return np.where(inside, self._pointers[places] // self.dtype.itemsize, self.num_tokens)

    def first_document_from(self, tokens: Int64Array) -> Int64Array:
        """Return, for each token, the first document that starts at or after it (lower bound).

        A bisection over the mapped index: log2(documents) small reads each.
        """
        offsets = (tokens * self.dtype.itemsize).tolist()
        return np.array([bisect_left(self._first_bytes, o) for o in offsets], dtype=np.int64)

    def starts_within(self, start: int, end: int) -> list[int]:
        """Return the first tokens of the documents that start in [start, end)."""
        size, first = self.dtype.itemsize, self._first_bytes
        low = bisect_left(first, start * size)
        high = bisect_left(first, end * size, low)
        return [first[document] // size for document in range(low, high)]

    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Return the lengths of all sequences in tokens, as a view of the mapped file."""
        return np.frombuffer(self._index(0, 4), dtype="<i4")

    @cached_property
    def _first_bytes(self) -> Sequence[int]:
        """The byte offset of each document, without numpy's cost per element."""
        pointers = cast("Sequence[int]", self._index(4, 8).cast("q"))
        if self.header.num_sequences == self.num_documents:  # then document d is sequence d
            return pointers
        places = cast("Sequence[int]", self._index(12, 8, self.num_documents).cast("q"))
        return cast("Sequence[int]", _Indirect(pointers, places))

    @cached_property
    def _pointers(self) -> Int64Array:
        return np.frombuffer(self._index(4, 8), dtype="<i8")

    @cached_property
    def _document_indices(self) -> Int64Array:
        return np.frombuffer(self._index(12, 8, self.num_documents + 1), dtype="<i8")

    def _index(self, before: int, itemsize: int, count: int | None = None) -> memoryview:
        """The section of the index that follows ``before`` bytes per sequence."""
        start = HEADER.size + before * self.header.num_sequences
        end = start + itemsize * (self.header.num_sequences if count is None else count)
        self.idx_file.need(start, end)
        return self.idx_file.view()[start:end]


class _Indirect:
    """``values[places[i]]`` as a sequence."""

    def __init__(self, values: Sequence[int], places: Sequence[int]) -> None:
        self._values, self._places = values, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, item: int) -> int:
        return self._values[self._places[item]]


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.newbyteorder("=").name
