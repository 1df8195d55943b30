"""Files of JSON lines that a process may be writing, or was killed while it wrote.

Invariant: a line is one object; one that a crash cut short, wherever it stands, is as if it had not
been written, and what is appended after it starts on a line of its own.

    json_lines.append(run / "events.jsonl", {"kind": "start"})
    json_lines.read(run / "metrics.jsonl")    # [{"step": 1, ...}, ...]; [] where there is no file
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

_BLOCK_BYTES = 1 << 17  # one call for many lines is twice as fast as one for each


def read(path: Path) -> list[dict[str, Any]]:
    """Objects of the file in order, none where there is no file."""
    return [row for block in blocks(path) for row in block]


def blocks(path: Path) -> Iterator[list[dict[str, Any]]]:
    """The same a block at a time, for files that need not be in memory as a whole."""
    try:
        with path.open("rb") as file:
            while lines := file.readlines(_BLOCK_BYTES):
                try:
                    rows = orjson.loads(b"[" + b",".join(lines) + b"]")
                except ValueError:
                    rows = whole(lines)
                yield [row for row in rows if isinstance(row, dict)]
    except FileNotFoundError:
        return


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, whole beside other processes' lines; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        put(file, row)
        os.fsync(file)
    finally:
        os.close(file)


def put(file: int, row: Mapping[str, Any]) -> None:
    """Add one line to a file that is open for reading and appending.

    Raises:
        OSError: there is no room; a part of the line may stand in the file.
    """
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        line = b"\n" + line  # a crash cut the line before
    while line:
        line = line[os.write(file, line) :]


def whole(lines: list[bytes]) -> list[Any]:
    """Return those of the lines that are JSON."""
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
