"""Read WARC files record by record, and go on after damage.

A ``.warc.gz`` is a row of gzip members, one per record, so a member that does not inflate costs one
record: the reader looks for the next member that begins with ``WARC/`` and goes on there. A plain
``.warc`` is searched for the next record header instead. Nothing is lost without being counted:
every damaged stretch comes out as a ``Damaged`` with its place in the file.

    for item in read_warc(Path("crawl.warc.gz")):
        ...
"""

import mmap
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastwarc.warc import WarcRecord, WarcRecordType

from llmtrain.errors import DataError

MAX_RECORD_BYTES = 256 << 20
"""Largest uncompressed gzip member that is read; anything above is no page."""
_CHUNK_BYTES = 64 << 10
_MAX_HEADER_BYTES = 64 << 10
_GZIP_MAGIC = b"\x1f\x8b\x08"
_RECORD_START = b"WARC/1."
_CONTENT_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d+)[ \t]*\r?$")
_PAGES = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion


class Record(NamedTuple):
    """One page of a crawl as it stands in the file."""

    record_id: str
    """WARC-Record-ID."""
    url: str
    """WARC-Target-URI."""
    timestamp: str
    """WARC-Date, ISO-8601."""
    offset: int
    """Byte offset of the record (of its gzip member) in the file."""
    length: int
    """Bytes of the record (of its gzip member) in the file."""
    payload: bytes
    """Body of the response with transfer and content encoding undone."""
    content_type: str
    """Content type of the body, as the server named it."""
    status: int
    """HTTP status, or 200 where the record holds no HTTP."""


class Damaged(NamedTuple):
    """A stretch of the file that holds no readable record."""

    offset: int
    """Where it begins in the file, in bytes."""
    length: int
    """Bytes up to where reading went on."""
    reason: str
    """What was wrong with it."""


class _Frame(NamedTuple):
    start: int
    end: int
    damage: str


def read_warc(path: Path) -> Iterator[Record | Damaged]:
    """Yield the pages of a ``.warc`` or ``.warc.gz`` file in order, and what could not be read.

    Raises:
        DataError: the file is empty or is no WARC at all.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; expected a WARC file; fetch it again or leave it out")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = data[: len(_RECORD_START)]
        if head.startswith(_GZIP_MAGIC):
            yield from _read_gzip(data)
        elif head == _RECORD_START:
            for frame in _frames(data):
                yield from _parse(data[frame.start : frame.end], frame.start, frame)
        else:
            raise DataError(f"{path} begins with {head!r}; expected gzip or {_RECORD_START!r}")


def read_member(path: Path, offset: int, length: int) -> Iterator[Record | Damaged]:
    """Yield the records of one member, given its place in the file, without reading the rest."""
    with path.open("rb") as file:
        file.seek(offset)
        raw = file.read(length)
    content = zlib.decompress(raw, 31) if raw.startswith(_GZIP_MAGIC) else raw
    for frame in _frames(content):
        yield from _parse(
            content[frame.start : frame.end], offset, frame._replace(start=0, end=length)
        )


def _read_gzip(data: mmap.mmap) -> Iterator[Record | Damaged]:
    offset = 0
    while offset < len(data):
        content, end, damage = _inflate(data, offset)
        if damage:
            end = _next_member(data, offset + 1)
            yield Damaged(offset, end - offset, damage)
        else:
            for frame in _frames(content):
                yield from _parse(
                    content[frame.start : frame.end],
                    offset,
                    frame._replace(start=0, end=end - offset),
                )
        offset = end


def _inflate(data: mmap.mmap, offset: int) -> tuple[bytes, int, str]:
    """Return the content of the member at ``offset``, where it ends, and what is wrong with it."""
    inflater = zlib.decompressobj(31)
    parts: list[bytes] = []
    size, position = 0, offset
    try:
        while not inflater.eof and position < len(data):
            chunk = data[position : position + _CHUNK_BYTES]
            position += len(chunk)
            parts.append(inflater.decompress(chunk))
            size += len(parts[-1])
            if size > MAX_RECORD_BYTES:
                return b"", position, f"member inflates to more than {MAX_RECORD_BYTES} bytes"
    except zlib.error as error:
        return b"", position, f"gzip member is damaged: {error}"
    if not inflater.eof:
        return b"", position, "file ends inside a gzip member"
    return b"".join(parts), position - len(inflater.unused_data), ""


def _next_member(data: mmap.mmap, start: int) -> int:
    """Return where the next gzip member that begins with a WARC header stands, or the end."""
    position = data.find(_GZIP_MAGIC, start)
    while position >= 0:
        try:
            window = data[position : position + _CHUNK_BYTES]
            if zlib.decompressobj(31).decompress(window, len(_RECORD_START)) == _RECORD_START:
                return position
        except zlib.error:
            pass
        position = data.find(_GZIP_MAGIC, position + 1)
    return len(data)


def _frames(data: bytes | mmap.mmap) -> Iterator[_Frame]:
    """Yield the extent of every record in uncompressed WARC data."""
    start = 0
    while start < len(data):
        end, damage = _record_end(data, start)
        if damage:
            following = data.find(b"\r\n" + _RECORD_START, start + 1)
            end = len(data) if following < 0 else following + 2
        yield _Frame(start, end, damage)
        start = end


def _record_end(data: bytes | mmap.mmap, start: int) -> tuple[int, str]:
    if data[start : start + len(_RECORD_START)] != _RECORD_START:
        return 0, "no WARC header where a record should begin"
    header_end = data.find(b"\r\n\r\n", start, start + _MAX_HEADER_BYTES)
    if header_end < 0:
        return 0, "WARC header has no end"
    length = _CONTENT_LENGTH.search(data[start : header_end + 2])
    if length is None:
        return 0, "WARC header has no Content-Length"
    end = header_end + 4 + int(length[1])
    if end > len(data):
        return 0, "record is shorter than its Content-Length"
    if data[end : end + 4] == b"\r\n\r\n":
        end += 4
    elif end < len(data):
        return 0, "record is longer than its Content-Length"
    return end, ""


def _parse(content: bytes, offset: int, frame: _Frame) -> Iterator[Record | Damaged]:
    """Yield the page in one record's bytes; requests, metadata and the like give none."""
    length = frame.end - frame.start
    if frame.damage:
        yield Damaged(offset, length, frame.damage)
        return
    try:
        record = WarcRecord.from_bytes(content)
        if not record.record_type & _PAGES:
            return
        status, content_type = 200, record.headers.get("Content-Type") or ""
        if record.is_http:
            record.parse_http(auto_decode="all")
            status = record.http_headers.status_code or 0
            content_type = record.http_headers.get("Content-Type") or ""
        yield Record(
            record_id=record.record_id or "",
            url=record.headers.get("WARC-Target-URI") or "",
            timestamp=record.headers.get("WARC-Date") or "",
            offset=offset,
            length=length,
            payload=record.reader.read(),
            content_type=content_type,
            status=status,
        )
    except (OSError, ValueError) as error:
        yield Damaged(offset, length, f"record does not parse: {error}")
