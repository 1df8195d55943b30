"""Documents of inputs that hold text already: JSONL, Parquet and Hugging Face datasets.

What cannot be read is yielded as ``Unreadable`` with its place and its reason. A damaged member of
a compressed file costs itself, where another one is whole; one that is cut is refused, because a
partial input is an error. Memory is that of one line, or of some megabytes of rows.

    for item in read_text_file(file, FieldsConfig()):
        ...
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.config.extract import ExtractConfig, FieldsConfig
from data_pipeline.document import Document, identity
from data_pipeline.read.inputs import HF_PREFIX, RawFile, document_id
from data_pipeline.read.lines import read_lines
from data_pipeline.read.members import Member
from data_pipeline.read.storage import local_copy
from llmtrain.errors import DataError

_CHUNK_BYTES = 1 << 20
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 1024

Columns = Callable[[Sequence[str]], list[str]]
"""Chooses columns of a table."""


class Unreadable(NamedTuple):
    """A record that holds no document."""

    offset: int
    """Byte offset or row number in the file."""
    length: int
    """Bytes of it, where known."""
    reason: str
    """What was wrong."""
    records: int = 1
    """Records lost, where more than one is known to be."""


class Row(NamedTuple):
    """One row of a table, or one line of JSON."""

    ordinal: int
    """Number of the line or row."""
    values: dict[str, Any] | str
    """Its fields, or why there are none."""
    length: int = 0
    """Its bytes in the file, where known."""


def read_text_file(
    file: RawFile,
    fields: FieldsConfig,
    max_record_bytes: int = ExtractConfig().max_record_bytes,
    folder: Path | None = None,
) -> Iterator[Document | Unreadable]:
    """Yield the documents of a JSONL, Parquet or Hugging Face input in order.

    A remote file is copied into ``folder`` first, by default one for temporary files.

    Raises:
        DataError: the file is cut or damaged beyond rows, or its rows lack a field that was named.
    """
    rows = read_rows(file, partial(_columns, file, fields), max_record_bytes, folder)
    yield from _documents(file, fields, rows)


def read_rows(
    file: RawFile,
    columns: Columns,
    max_record_bytes: int = ExtractConfig().max_record_bytes,
    folder: Path | None = None,
) -> Iterator[Row | Unreadable]:
    """Yield the rows of a JSONL, Parquet or Hugging Face input in order.

    ``columns`` is given the names of a table's columns and returns those that are read.

    Raises:
        DataError: the file is cut or damaged beyond rows.
    """
    if file.format == "hf":
        yield from _read_hf(file, columns)
        return
    with local_copy(file.path, folder, file.sha256) as path:
        if file.format == "jsonl":
            yield from _read_jsonl(file, path, max_record_bytes)
        else:
            yield from _read_parquet(file, path, columns)


def _documents(
    file: RawFile, fields: FieldsConfig, rows: Iterator[Row | Unreadable]
) -> Iterator[Document | Unreadable]:
    first, seen = True, False
    for row in rows:
        if isinstance(row, Unreadable):
            yield row
            continue
        if isinstance(row.values, str):
            yield Unreadable(row.ordinal, row.length, row.values)
            continue
        if first:
            _check_named(file, fields, row.values)
            first = False
        text = row.values.get(fields.text)
        if isinstance(text, str):
            seen = True
            yield _document(file, fields, row, text)
            continue
        if not seen and fields.text not in row.values:
            raise _absent(
                file, fields.text, row.values, "text_field= (pipeline.fields.text= in a run)"
            )
        yield Unreadable(row.ordinal, row.length, f"field {fields.text!r} holds no text")


def _check_named(file: RawFile, fields: FieldsConfig, names: Collection[str]) -> None:
    """Refuse fields without an optional one that does not have its default name."""
    usual = FieldsConfig()
    if fields.id is not None and fields.id not in names:
        raise _absent(file, fields.id, names, "id_field= (pipeline.fields.id= in a run)")
    if fields.url != usual.url and fields.url not in names:
        raise _absent(file, fields.url, names, "pipeline.fields.url=")
    if fields.timestamp != usual.timestamp and fields.timestamp not in names:
        raise _absent(file, fields.timestamp, names, "pipeline.fields.timestamp=")
    for name in fields.metadata:
        if name not in names:
            raise _absent(file, name, names, "pipeline.fields.metadata=")


def _absent(file: RawFile, field: str, names: Collection[str], key: str) -> DataError:
    return DataError(
        f"{file.path} has no field {field!r}; its fields are {', '.join(sorted(map(str, names)))}; "
        f"name the right one with {key}"
    )


def _document(file: RawFile, fields: FieldsConfig, row: Row, text: str) -> Document:
    values: Mapping[str, Any] = row.values if isinstance(row.values, dict) else {}
    own_id = values.get(fields.id) if fields.id else None
    key = (_storable(own_id),) if own_id is not None else (file.sha256, str(row.ordinal))
    text = _storable(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Document(
        id=document_id(file.source, *key),
        source=file.source,
        text=text,
        url=_storable(values.get(fields.url) or ""),
        timestamp=_storable(values.get(fields.timestamp) or ""),
        source_file_id=file.sha256,
        member_offset=row.ordinal,
        member_length=row.length,
        payload_sha256=digest,
        extracted_sha256=digest,
        edits=identity(text),
        metadata={
            name: _as_text(values[name]) for name in fields.metadata if values.get(name) is not None
        },
    )


def _storable(value: object) -> str:
    """Return a value as text that UTF-8 can hold; a lone surrogate becomes a question mark."""
    text = value if isinstance(value, str) else str(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _as_text(value: object) -> str:
    """Return a value as text: strings as they are, others as JSON."""
    if isinstance(value, str):
        return _storable(value)
    return _storable(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str))


def _read_jsonl(file: RawFile, path: Path, limit: int) -> Iterator[Row | Unreadable]:
    number = 0
    for item in read_lines(path, file.path, limit):
        if isinstance(item, Member):
            yield Unreadable(item.offset, item.end - item.offset, item.damage)
            continue
        line, size = item
        if line is None:
            yield Row(number, f"line has {size} bytes, more than max_record_bytes={limit}", size)
        elif line.strip():
            yield Row(number, _parse_line(line), size)
        number += 1


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return "line is no JSON"
    return row if isinstance(row, dict) else "line is no JSON object"


def _columns(file: RawFile, fields: FieldsConfig, names: Collection[str]) -> list[str]:
    """Return the columns a table is read for, after checking that they are there."""
    _check_named(file, fields, names)
    if fields.text not in names:
        raise _absent(file, fields.text, names, "text_field= (pipeline.fields.text= in a run)")
    wanted = (fields.text, fields.id, fields.url, fields.timestamp, *fields.metadata)
    return list(dict.fromkeys(name for name in wanted if name in names and name is not None))


def _table_rows(batch: Any, first: int) -> Iterator[Row]:
    """Yield the rows of a record batch; a value that is no UTF-8 costs its row."""
    try:
        rows = batch.to_pylist()
    except ValueError:
        for i in range(batch.num_rows):
            try:
                yield Row(first + i, batch.slice(i, 1).to_pylist()[0])
            except ValueError as error:
                yield Row(first + i, f"row does not decode: {_first_line(error)}")
        return
    for i, row in enumerate(rows):
        yield Row(first + i, row)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _read_parquet(file: RawFile, path: Path, columns: Columns) -> Iterator[Row | Unreadable]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES, pre_buffer=False) as parquet:
            names = parquet.schema_arrow.names
            groups = [parquet.metadata.row_group(g) for g in range(parquet.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
            if sum(rows for rows, _ in sizes) != parquet.metadata.num_rows:
                raise pa.ArrowInvalid("its row groups do not add up to its rows")
            wanted = columns(names) if parquet.metadata.num_rows else []
            whole, first = not sizes, 0
            for group, (rows, size) in enumerate(sizes):
                lost = 0
                for row in _read_group(parquet, group, first, (rows, size), wanted):
                    lost += isinstance(row, Unreadable)
                    yield row
                whole, first = whole or not lost, first + rows
            if not whole:
                raise pa.ArrowInvalid("none of its row groups is whole")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{file.path} does not read as Parquet: {_first_line(error)}; fetch it again or leave "
            "it out"
        ) from error


def _read_group(
    parquet: Any, group: int, first: int, extent: tuple[int, int], columns: list[str]
) -> Iterator[Row | Unreadable]:
    """Yield the rows of a row group of (rows, bytes), and what is lost of it."""
    import pyarrow as pa

    rows, size = extent
    number, end, reason = first, first + rows, "ends early"
    batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))
    try:
        for batch in parquet.iter_batches(
            batch_size=batch_rows, row_groups=[group], columns=columns, use_threads=False
        ):
            yield from _table_rows(batch, number)
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = f"does not read: {_first_line(error)}"
    if number < end:
        place = f"row group {group}, rows {number} to {end - 1}"
        yield Unreadable(number, 0, f"{place}: {reason}", end - number)


def _read_hf(file: RawFile, columns: Columns) -> Iterator[Row]:
    rows = _open_hf(file.path)
    if not len(rows):
        return
    table = rows.select_columns(columns(rows.column_names)).with_format("arrow")
    number = 0
    for part in table.iter(batch_size=_BATCH_ROWS // 4):
        for batch in part.to_batches():
            yield from _table_rows(batch, number)
            number += batch.num_rows


def hf_fingerprint(path: str) -> tuple[str, int]:
    """Return the fingerprint ``datasets`` keeps of ``hf:NAME``, and the bytes of its table."""
    rows = _open_hf(path)
    return f"{version('datasets')}-{rows._fingerprint}", int(rows.data.nbytes)


def _open_hf(path: str) -> Any:
    """Open ``hf:FOLDER[:SPLIT]`` (``save_to_disk``, or files) or ``hf:NAME[:SPLIT]``."""
    import datasets

    name, _, split = path.removeprefix(HF_PREFIX).partition(":")
    split = split or "train"
    folder = Path(name)
    try:
        if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise DataError(f"{path} does not open as a dataset: {_first_line(error)}") from error
