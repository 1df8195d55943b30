"""Where every document of a store came from: ``part-NNNNN.docs.parquet`` and its edit maps.

Row d of the file belongs to document d of the shard. ``num_tokens`` counts its EOS, so the column
sums to the tokens of the shard. The edit map leads from the text that was tokenized back to the
text the extractor produced, in characters; it is kept as gaps (list<int32>), three numbers per run:
characters between the last run and this one in the final text, the same in the extracted text, and
the length of the run. Bytes of the file depend on the records alone.

    record = read_records(Path("stores/wiki/part-00000.docs.parquet"))[7]
    record.resolve(120, 180)   # spans of the extracted text behind characters 120..180
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.errors import DataError

ROWS_PER_GROUP = 1_024
"""Documents per Parquet row group; reading one record reads one group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRecord:
    """One document of a store: its origin and the way back to it."""

    id: str
    """blake3-128 hex; unique within the source."""
    url: str = ""
    """Address, or an empty string."""
    source_file_id: str = ""
    """sha256 hex of the raw file it was read from."""
    member_offset: int = 0
    """Byte offset of its record in the raw file, or its line or row ordinal."""
    member_length: int = 0
    """Bytes of its record in the raw file."""
    payload_sha256: str = ""
    """sha256 hex of the payload that was extracted."""
    extractor_name: str = "none"
    """What made the text."""
    extractor_version: str = ""
    """Version that made the text."""
    extractor_options: str = ""
    """Its options as canonical JSON."""
    extracted_sha256: str = ""
    """sha256 hex of the extracted text as UTF-8."""
    text_bytes: int = 0
    """UTF-8 bytes of the final text."""
    num_tokens: int = 0
    """Tokens in the store, EOS included; the shard writer sets it."""
    cluster: str = ""
    """Id of its near-duplicate cluster, or an empty string."""
    language: str = ""
    """ISO-639-1 code, or an empty string."""
    edits: tuple[tuple[int, int, int], ...] = field(default=())
    """Runs (final_start, extracted_start, length) in characters, in rising order."""

    def runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return what of the final text [start, end) stands in the extracted text, in characters.

        Runs (final_start, extracted_start, length), cut to the span. Characters that a rule
        inserted have no origin and are left out.
        """
        found = []
        first = max(0, bisect_right(self.edits, start, key=lambda run: run[0]) - 1)
        for final, extracted, length in self.edits[first:]:
            if final >= end:
                break
            low, high = max(final, start), min(final + length, end)
            if low < high:
                found.append((low, extracted + low - final, high - low))
        return found

    def resolve(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the spans of the extracted text behind the final text [start, end)."""
        return [(origin, origin + length) for _, origin, length in self.runs(start, end)]


def encode_edits(edits: Sequence[tuple[int, int, int]]) -> list[int]:
    """Turn runs into gaps, as the file keeps them."""
    gaps: list[int] = []
    final_end = extracted_end = 0
    for final, extracted, length in edits:
        gaps += (final - final_end, extracted - extracted_end, length)
        final_end, extracted_end = final + length, extracted + length
    return gaps


def decode_edits(gaps: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Turn gaps into runs; the inverse of ``encode_edits``."""
    table = np.asarray(gaps, dtype=np.int64).reshape(-1, 3)
    ends = np.cumsum(table[:, :2] + table[:, 2:], axis=0)
    starts = ends - table[:, 2:]
    return tuple(
        (int(final), int(extracted), int(length))
        for (final, extracted), length in zip(starts, table[:, 2], strict=True)
    )


def text_span(
    ids: Sequence[int], start: int, end: int, decode: Callable[[Sequence[int]], str]
) -> tuple[int, int]:
    """Return the characters of the final text that tokens [start, end) of a document cover.

    ``ids`` are the tokens of the document without EOS. A character spelled by several byte tokens
    belongs to the span as soon as one of them does.
    """
    full = decode(ids)
    first = _common_prefix(decode(ids[:start]), full)
    through = decode(ids[:end])
    last = _common_prefix(through, full)
    return first, max(first, last + (len(through) > last))


def schema() -> Any:
    """Return the Arrow schema of ``docs.parquet``."""
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    extractor = pa.struct([("name", text), ("version", text), ("options", text)])
    columns = [
        ("id", text), ("url", text), ("source_file_id", text), ("member_offset", number),
        ("member_length", number), ("payload_sha256", text), ("extractor", extractor),
        ("extracted_sha256", text), ("text_bytes", number), ("num_tokens", number),
        ("cluster", text), ("language", text), ("edits", pa.list_(pa.int32())),
    ]  # fmt: skip
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def encode_edit_lists(edits: Any) -> Any:
    """Turn an Arrow list<int32> of runs, three numbers each, into one of gaps, as the file has it.

    The same as ``encode_edits`` for every document, without a Python object per run.
    """
    import pyarrow as pa

    runs = edits.flatten().to_numpy(zero_copy_only=False).reshape(-1, 3).astype(np.int64)
    ends = runs[:, :2] + runs[:, 2:]
    before = np.zeros_like(ends)
    before[1:] = ends[:-1]
    offsets = edits.offsets.to_numpy().astype(np.int64) - edits.offsets[0].as_py()
    first = offsets[:-1][np.diff(offsets) > 0] // 3
    before[first] = 0
    gaps = np.column_stack([runs[:, :2] - before, runs[:, 2]]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(gaps.reshape(-1)))


class RecordWriter:
    """Writes records in row groups; the bytes do not depend on how they are added."""

    def __init__(self, path: Path) -> None:
        """Open ``path`` for writing."""
        import pyarrow.parquet as pq

        self._schema = schema()
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", compression_level=3, version="2.6",
            use_dictionary=True, write_statistics=False, store_schema=False,
        )  # fmt: skip
        self._rows: list[dict[str, Any]] = []
        self._tables: list[Any] = []
        self._num_rows = 0

    def add(self, record: DocumentRecord, num_tokens: int) -> None:
        """Append one record; ``num_tokens`` replaces the record's own count."""
        self._rows.append(_to_row(record, num_tokens))
        self._num_rows += 1
        if self._num_rows >= ROWS_PER_GROUP:
            self._flush(ROWS_PER_GROUP)

    def add_table(self, table: Any) -> None:
        """Append an Arrow table of ``schema()``."""
        self._gather_rows()
        self._tables.append(table.select(self._schema.names).cast(self._schema))
        self._num_rows += table.num_rows
        if self._num_rows >= ROWS_PER_GROUP:
            self._flush(self._num_rows - self._num_rows % ROWS_PER_GROUP)

    def close(self) -> None:
        """Write what is left and the footer."""
        if self._num_rows:
            self._flush(self._num_rows)
        self._writer.close()

    def _gather_rows(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._tables.append(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def _flush(self, num_rows: int) -> None:
        """Write the first ``num_rows`` in row groups of ``ROWS_PER_GROUP``."""
        import pyarrow as pa

        self._gather_rows()
        table = pa.concat_tables(self._tables)
        for start in range(0, num_rows, ROWS_PER_GROUP):
            group = table.slice(start, min(ROWS_PER_GROUP, num_rows - start))
            self._writer.write_table(group.combine_chunks())
        self._tables = [table.slice(num_rows)] if num_rows < table.num_rows else []
        self._num_rows -= num_rows


def iterate_records(path: Path) -> Iterator[DocumentRecord]:
    """Read the records of one shard in order, one row group in memory at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(_existing(path)) as file:
        for group in range(file.num_row_groups):
            yield from map(_from_row, file.read_row_group(group).to_pylist())


def read_records(path: Path) -> list[DocumentRecord]:
    """Read all records of one shard."""
    return list(iterate_records(path))


def read_record(path: Path, document: int) -> DocumentRecord:
    """Read the record of one document of a shard; reads one row group."""
    return read_selected(path, [document])[document]


def read_selected(path: Path, documents: Iterable[int]) -> dict[int, DocumentRecord]:
    """Read the records of some documents of a shard; every row group they stand in once."""
    import pyarrow.parquet as pq

    left, first = sorted(set(documents)), 0
    found: dict[int, DocumentRecord] = {}
    with pq.ParquetFile(_existing(path)) as file:
        total = file.metadata.num_rows
        if outside := [d for d in left if not 0 <= d < total]:
            raise DataError(f"{path} holds {total} records; {outside[0]} is outside")
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            wanted = left[bisect_left(left, first) : bisect_left(left, end)]
            if wanted:
                table = file.read_row_group(group)  # sliced: an index array would load pandas
                found |= {d: _from_row(table.slice(d - first, 1).to_pylist()[0]) for d in wanted}
            first = end
    return found


def read_counts(path: Path, column: str = "num_tokens") -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Read one integer column (``num_tokens``, ``text_bytes``) of a shard."""
    import pyarrow.parquet as pq

    values = pq.read_table(_existing(path), columns=[column]).column(column).to_numpy()
    return np.asarray(values, dtype=np.int64)


def _common_prefix(one: str, other: str) -> int:
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; stores written by llmtrain-data keep their documents' origin "
            "there, stores of other programs have none"
        )
    return path


def _to_row(record: DocumentRecord, num_tokens: int) -> dict[str, Any]:
    return {
        "id": record.id,
        "url": record.url,
        "source_file_id": record.source_file_id,
        "member_offset": record.member_offset,
        "member_length": record.member_length,
        "payload_sha256": record.payload_sha256,
        "extractor": {
            "name": record.extractor_name,
            "version": record.extractor_version,
            "options": record.extractor_options,
        },
        "extracted_sha256": record.extracted_sha256,
        "text_bytes": record.text_bytes,
        "num_tokens": num_tokens,
        "cluster": record.cluster,
        "language": record.language,
        "edits": encode_edits(record.edits),
    }


def _from_row(row: dict[str, Any]) -> DocumentRecord:
    extractor = row.pop("extractor")
    edits = decode_edits(row.pop("edits"))
    return DocumentRecord(
        extractor_name=extractor["name"],
        extractor_version=extractor["version"],
        extractor_options=extractor["options"],
        edits=edits,
        **row,
    )
