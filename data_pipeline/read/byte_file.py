"""A file read at any place through one buffer, so that reading it never holds more than that.

A memory map would count every page that was touched as memory of the process, and die with a signal
if the file is cut while it is read.

    with ByteFile(path) as file:
        head = file.read(0, 8)
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

_BUFFER_BYTES = 256 << 10


class ByteFile:
    """Random access to the bytes of one file."""

    def __init__(self, path: Path) -> None:
        """Open the file; its size is fixed from here on."""
        self._handle = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._handle).st_size
        self._start = 0
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._handle)

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes [start, start + length), fewer at the end of the file."""
        length = max(0, min(length, self.size - start))
        skip = start - self._start
        if skip >= 0 and skip + length <= len(self._buffer):
            return self._buffer[skip : skip + length]
        if length >= _BUFFER_BYTES:
            return self._read(start, length)
        self._start, self._buffer = start, self._read(start, _BUFFER_BYTES)
        return self._buffer[:length]

    def _read(self, start: int, length: int) -> bytes:
        parts: list[bytes] = []
        while length > 0 and (part := os.pread(self._handle, length, start)):
            parts.append(part)
            start += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class InMemory:
    """Bytes that are in memory already, read like a file."""

    def __init__(self, content: bytes) -> None:
        """Keep the bytes."""
        self.content = content
        self.size = len(content)

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes [start, start + length), fewer at the end."""
        return self.content[start : start + length]


class Readable(Protocol):
    """Bytes that can be read at any place."""

    size: int
    """How many there are."""

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes [start, start + length), fewer at the end."""
        ...


def find(data: Readable, pattern: bytes, start: int) -> int:
    """Return where ``pattern`` stands first at or after ``start``, or -1."""
    if isinstance(data, InMemory):
        return data.content.find(pattern, start)
    while start + len(pattern) <= data.size:
        window = data.read(start, _BUFFER_BYTES)
        at = window.find(pattern)
        if at >= 0:
            return start + at
        if len(window) < len(pattern):
            break
        start += len(window) - len(pattern) + 1
    return -1
