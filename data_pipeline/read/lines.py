"""Lines of plain or compressed text, each of bounded length.

A damaged member of a compressed file costs itself, where another one is whole; the two pieces of
lines around it are lines of their own. A file that is cut is refused: a partial input is an error.

    for item in read_lines(path, "a.jsonl.gz", limit=8 << 20):
        ...
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipeline.read.byte_file import ByteFile
from data_pipeline.read.members import CODECS, Member, inflate, read_members
from llmtrain.errors import DataError

_CHUNK_BYTES = 1 << 20


class Line(NamedTuple):
    """One line."""

    content: bytes | None
    """It without its end, or None if it is too long to be kept."""
    length: int
    """Its bytes."""


def read_lines(path: Path, name: str, limit: int) -> Iterator[Line | Member]:
    """Yield the lines of a file in order, and the members that could not be read.

    The ending of ``path`` tells how it is compressed; messages call it ``name``.

    Raises:
        DataError: the file is cut, or no member beside a damaged one is whole.
    """
    lines, ending = _Lines(limit), path.suffix.lower()
    if ending not in CODECS:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield from lines.feed(chunk)
        yield lines.end()
        return
    codec, whole = CODECS[ending](), False
    with ByteFile(path) as packed:
        for member in read_members(packed, codec):
            if not member.damage:
                whole = True
                for piece in inflate(packed, codec, member):
                    yield from lines.feed(piece)
                continue
            if member.end == packed.size and (member.cut or not whole):
                raise DataError(
                    f"{name} is cut or damaged ({member.damage} at byte {member.offset}); "
                    "fetch it again or leave it out"
                )
            yield lines.end()  # what stood before and what follows are not one line
            yield member
    yield lines.end()


class _Lines:
    """Cuts pieces of text into lines; one that is too long is counted and not kept."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[Line]:
        """Yield every line that the piece ends."""
        first, *others = piece.split(b"\n")
        self._append(first)
        for part in others:
            yield self.end()
            self._append(part)

    def _append(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self.limit:
            self._parts.append(part)
        else:
            self._parts.clear()

    def end(self) -> Line:
        """End the present line where it is."""
        line = None if self._size > self.limit else b"".join(self._parts)
        size, self._parts, self._size = self._size, [], 0
        return Line(line, size)
