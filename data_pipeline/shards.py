"""Document shards between stages: Parquet files whose bytes depend on their content alone.

Writer version, compression and row-group size are fixed and nothing inside tells the time, so the
same documents give the same file whoever writes it. A shard is named by its digest in manifests;
reading checks the digest first, so a damaged or half-copied shard is an error and never an input.

    info = write_documents(Path("part.parquet"), documents)
    documents = read_documents(folder, shard)
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3
import pyarrow as pa
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


def with_reasons(table: pa.Table, reasons: Sequence[str]) -> pa.Table:
    """Return a document table with the reason each of its documents was dropped for."""
    return table.append_column(DROPPED_SCHEMA.field("reason"), pa.array(reasons, pa.string()))


def write_table(path: Path, table: pa.Table) -> tuple[str, int]:
    """Write a Parquet file durably; return its digest and size. Equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(), sink, version="2.6", compression="zstd", compression_level=1,
        row_group_size=1 << 20, data_page_version="2.0", write_statistics=False,
    )  # fmt: skip
    content = memoryview(sink.getvalue())
    write_durably(path, content)
    return digest_of(content), len(content)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write and fsync a file; the name is the caller's to make unique or to rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_of(content: bytes | memoryview) -> str:
    """blake3 of bytes as 32 hex digits."""
    return blake3.blake3(content).hexdigest(length=16)


def read_table(out: Path, shard: Shard, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a shard (or some columns of it) after checking that it is whole.

    Raises:
        DataError: the file is missing or its digest is not the manifest's.
    """
    path = out / shard.path
    if not path.is_file():
        raise DataError(f"{path} is missing; remove the stage's folder to make it again")
    content = path.read_bytes()
    if digest_of(content) != shard.digest:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes, expected {shard.size} with digest "
            f"{shard.digest}; remove the stage's folder to make it again"
        )
    return pq.read_table(
        pa.BufferReader(content), columns=None if columns is None else list(columns)
    )


def read_documents(out: Path, shard: Shard) -> list[Document]:
    """Read a shard's documents after checking that it is whole."""
    return from_table(read_table(out, shard))


def text_size(texts: Iterable[str]) -> tuple[int, int]:
    """UTF-8 bytes and characters of some texts."""
    size = characters = 0
    for text in texts:
        characters += len(text)
        size += len(text) if text.isascii() else len(text.encode())
    return size, characters
