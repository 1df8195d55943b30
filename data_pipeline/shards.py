"""Document shards between stages: Parquet files whose bytes depend on their content alone.

Writer version, compression and the cut into row groups are fixed by the content and nothing inside
tells the time, so the same documents give the same file whoever writes it. A shard is named by its
digest in manifests; reading checks the digest first, so a damaged or half-copied shard is an error
and never an input. Both directions hold one row group in memory, whatever the size of the shard.

    for table in read_batches(out, shard): ...
    documents = read_documents(out, shard)
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.document import Document, Extractor, Run
from llmtrain.errors import DataError

EXTRACTOR_TYPE = pa.struct(
    [("name", pa.string()), ("version", pa.string()), ("options", pa.string())]
)
SCHEMA = pa.schema([
    pa.field("id", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("text", pa.large_string(), nullable=False),
    pa.field("url", pa.string(), nullable=False),
    pa.field("timestamp", pa.string(), nullable=False),
    pa.field("source_file_id", pa.string(), nullable=False),
    pa.field("member_offset", pa.int64(), nullable=False),
    pa.field("member_length", pa.int64(), nullable=False),
    pa.field("payload_sha256", pa.string(), nullable=False),
    pa.field("extractor", EXTRACTOR_TYPE, nullable=False),
    pa.field("extracted_sha256", pa.string(), nullable=False),
    pa.field("edits", pa.list_(pa.int32()), nullable=False),
    pa.field("language", pa.string(), nullable=False),
    pa.field("language_score", pa.float64(), nullable=False),
    pa.field("cluster", pa.string(), nullable=False),
    pa.field("cluster_size", pa.int64(), nullable=False),
    pa.field("metadata", pa.map_(pa.string(), pa.string()), nullable=False),
])  # fmt: skip
DROPPED_SCHEMA = SCHEMA.append(pa.field("reason", pa.string(), nullable=False))
"""Schema of the shards under ``dropped/``: the document as it was, and why it went."""

ROW_GROUP_BYTES = 4 << 20
"""Text in a row group: what a task that reads or writes a shard holds in memory."""
_PIECE_BYTES = 1 << 20
_REPEATED = ["source", "source_file_id", "language", "reason"]
"""Columns with few different values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A file of documents, as manifests name it."""

    path: str
    """Path below the pipeline's output folder."""
    source: str
    """Source its documents belong to."""
    rows: int
    """Documents in it."""
    text_bytes: int
    """UTF-8 bytes of their texts."""
    text_characters: int
    """Characters of their texts."""
    digest: str
    """blake3 of the file, 32 hex digits."""
    size: int
    """Bytes of the file."""

    def as_dict(self) -> dict[str, Any]:
        """The shard as JSON-able values."""
        return asdict(self)


def to_table(documents: Sequence[Document]) -> pa.Table:
    """Return the documents as a table of ``SCHEMA``."""
    columns: dict[str, Any] = {name: [] for name in SCHEMA.names}
    for document in documents:
        for name, column in columns.items():
            column.append(getattr(document, name))
    columns["extractor"] = [
        {"name": e.name, "version": e.version, "options": e.options} for e in columns["extractor"]
    ]
    columns["edits"] = [[value for run in edits for value in run] for edits in columns["edits"]]
    columns["metadata"] = [sorted(entries.items()) for entries in columns["metadata"]]
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Document]:
    """Return the documents a table of ``SCHEMA`` holds."""
    columns = {name: table.column(name).to_pylist() for name in SCHEMA.names}
    extractors: dict[tuple[str, ...], Extractor] = {}
    for i, entry in enumerate(columns["extractor"]):
        key = (entry["name"], entry["version"], entry["options"])
        columns["extractor"][i] = extractors.setdefault(
            key, Extractor(name=key[0], version=key[1], options=key[2])
        )
    for i, flat in enumerate(columns["edits"]):
        columns["edits"][i] = tuple(map(Run, flat[::3], flat[1::3], flat[2::3]))
    columns["metadata"] = [dict(entries) for entries in columns["metadata"]]
    names = list(columns)
    return [
        Document(**dict(zip(names, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


def with_documents(table: pa.Table, changed: Mapping[int, Document]) -> pa.Table:
    """Return a document table with the documents of some rows changed."""
    if not changed:
        return table
    rows = np.fromiter(changed, np.int64, len(changed))
    same = np.setdiff1d(np.arange(table.num_rows), rows)
    both = pa.concat_tables([table.take(pa.array(same)), to_table(list(changed.values()))])
    return both.take(pa.array(np.argsort(np.concatenate([same, rows]))))


def with_reasons(table: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """Return a document table with the reason each of its documents was dropped for."""
    return table.append_column(DROPPED_SCHEMA.field("reason"), pa.array(reasons, pa.string()))


class ShardFile:
    """Writes one Parquet file of documents; equal documents give equal bytes, however cut up."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Make the file and its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows = 0
        self.text_bytes = 0
        self.text_characters = 0
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self._writer = pq.ParquetWriter(
            path, schema, version="2.6", compression="zstd", compression_level=1,
            data_page_version="2.0", write_statistics=False, use_dictionary=_REPEATED,
        )  # fmt: skip

    def add(self, table: pa.Table) -> None:
        """Append documents; a row group ends with the document that fills it."""
        sizes = text_lengths(table)
        self.rows += table.num_rows
        self.text_bytes += int(sizes.sum())
        self.text_characters += int(pc.sum(pc.utf8_length(table.column("text"))).as_py() or 0)
        ends = self._pending_bytes + np.cumsum(sizes)
        start = 0
        while len(ends) and ends[-1] >= ROW_GROUP_BYTES:
            cut = start + int(np.searchsorted(ends, ROW_GROUP_BYTES)) + 1
            self._pending.append(table.slice(start, cut - start))
            self._flush()
            ends = ends[cut - start :] - ends[cut - start - 1]
            start = cut
        if start < table.num_rows:
            self._pending.append(table.slice(start))
            self._pending_bytes = int(ends[-1])

    def _flush(self) -> None:
        if self._pending:
            group = pa.concat_tables(self._pending).combine_chunks()
            self._writer.write_table(group, row_group_size=max(1, group.num_rows))
        self._pending, self._pending_bytes = [], 0

    def close(self) -> tuple[str, int]:
        """Finish the file durably; return its digest and its size in bytes."""
        self._flush()
        self._writer.close()
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        return digest_of_file(self.path), self.path.stat().st_size


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write and fsync a file; the name is the caller's to make unique or to rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def digest_of(content: bytes | memoryview) -> str:
    """blake3 of bytes as 32 hex digits."""
    return blake3.blake3(content).hexdigest(length=16)


def digest_of_file(path: Path) -> str:
    """blake3 of a file as 32 hex digits."""
    digest = blake3.blake3()
    with path.open("rb", buffering=0) as file:  # mapped pages would count as a worker's memory
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest(length=16)


def open_shard(out: Path, shard: Shard) -> pq.ParquetFile:
    """Open a shard after checking that it is whole.

    Raises:
        DataError: the file is missing or its digest is not the manifest's.
    """
    path = out / shard.path
    if not path.is_file():
        raise DataError(f"{path} is missing; remove the stage's folder to make it again")
    size = path.stat().st_size
    if size != shard.size or digest_of_file(path) != shard.digest:
        raise DataError(
            f"{path} is damaged: {size} bytes, expected {shard.size} with digest {shard.digest}; "
            "remove the stage's folder to make it again"
        )
    return pq.ParquetFile(pa.OSFile(str(path)))


def read_batches(
    out: Path, shard: Shard, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the documents of a shard (or some columns), about ``ROW_GROUP_BYTES`` of text a time.

    Raises:
        DataError: the file is missing or its digest is not the manifest's.
    """
    with open_shard(out, shard) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=None if columns is None else list(columns))


def read_table(out: Path, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a whole shard, or some small columns of it.

    Raises:
        DataError: the file is missing or its digest is not the manifest's.
    """
    with open_shard(out, shard) as file:
        return file.read(columns=None if columns is None else list(columns))


def read_documents(out: Path, shard: Shard) -> list[Document]:
    """Read a shard's documents after checking that it is whole."""
    return from_table(read_table(out, shard))


def text_lengths(table: pa.Table) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of every text of a table, [rows]."""
    lengths = pc.binary_length(table.column("text"))
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def text_size(texts: Iterable[str]) -> tuple[int, int]:
    """UTF-8 bytes and characters of some texts."""
    size = characters = 0
    for text in texts:
        characters += len(text)
        size += len(text) if text.isascii() else len(text.encode())
    return size, characters
