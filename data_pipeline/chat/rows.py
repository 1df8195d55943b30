"""The rows of files that hold chat data, and what tells one from another.

A row that cannot be read is refused with its place: none is passed over.

    for row in chat_rows(file):
        payload_digest(row.values)
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.chat.messages import COLUMNS
from data_pipeline.read.inputs import RawFile
from data_pipeline.read.rows import Row, Unreadable, read_rows
from llmtrain.errors import DataError

EXTRACTOR = "chat_template"
"""What a store says made the texts of its documents."""


def payload_digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 hex of what is read of a row, as canonical JSON.

    Raises:
        DataError: it holds what UTF-8 cannot.
    """
    read = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    try:
        plain = json.dumps(read, sort_keys=True, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise DataError("it holds half of a surrogate pair, which is no character") from None
    return hashlib.sha256(plain).hexdigest()


def chat_rows(file: RawFile, id_field: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file that holds chat data.

    Raises:
        DataError: a row is damaged or no JSON object; says where.
    """
    for row in read_rows(file, lambda names: _columns(file, id_field, names)):
        if isinstance(row, Unreadable):
            raise DataError(f"{file.path} at {row.offset:,}: {row.reason}; fetch it again")
        if isinstance(row.values, str):
            raise DataError(
                f"{place_of(file, row)}: {row.values}; a conversation a line is expected"
            )
        if file.format == "jsonl":
            yield row
        else:
            yield row._replace(values=_without_nulls(row.values))


def place_of(file: RawFile, row: Row) -> str:
    """Say where a row stands."""
    what = f"line {row.ordinal + 1}" if file.format == "jsonl" else f"row {row.ordinal}"
    return f"{file.path}, {what}"


def _columns(file: RawFile, id_field: str | None, names: Sequence[str]) -> list[str]:
    found = [name for name in (*COLUMNS, id_field) if name in names and name is not None]
    if not found:
        raise DataError(
            f"{file.path} has the fields {', '.join(sorted(names))}; expected some of "
            f"{', '.join(COLUMNS)}: rename them"
        )
    return found


def _without_nulls(value: Any) -> Any:
    """Leave out the keys that a table has because another of its rows has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value
