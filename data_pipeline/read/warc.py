"""Read WARC files record by record, and go on after damage.

A ``.warc.gz`` is a row of gzip members, one per record, so a member that does not inflate costs one
record: the reader looks for the next member that begins with ``WARC/`` and goes on there. A plain
``.warc`` is searched for the next record header instead. Nothing is lost without being counted:
every damaged stretch comes out as a ``Damaged`` with its place in the file. Memory is that of one
record, also where one gzip member holds the whole crawl.

    for item in read_warc(Path("crawl.warc.gz")):
        ...
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastwarc.warc import WarcRecord, WarcRecordType

from data_pipeline.read.byte_file import ByteFile, InMemory, Readable, find
from data_pipeline.read.members import GZIP, Inflated, Member, scan
from llmtrain.errors import DataError

MAX_RECORD_BYTES = 8 << 20
"""Longest record that is read, in uncompressed bytes, where no other limit is given."""
_WINDOW_BYTES = 64 << 10
_MAX_HEADER_BYTES = 64 << 10
_LENGTH_DIGITS = 18
_RECORD_START = b"WARC/1."
_CONTENT_LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d+)[ \t]*\r?$")
_PAGE_HEADER = re.compile(rb"(?im)^warc-type:[ \t]*(?:response|resource|conversion)[ \t]*\r?$")
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
    content: bytes
    damage: str


def read_warc(path: Path, max_record_bytes: int = MAX_RECORD_BYTES) -> Iterator[Record | Damaged]:
    """Yield the pages of a ``.warc`` or ``.warc.gz`` file in order, and what could not be read.

    Raises:
        DataError: the file is empty or is no WARC at all.
    """
    with ByteFile(path) as file:
        if file.size == 0:
            raise DataError(
                f"{path} is empty; expected a WARC file; fetch it again or leave it out"
            )
        head = file.read(0, len(_RECORD_START))
        if head.startswith(GZIP.magic):
            yield from _read_gzip(file, max_record_bytes)
        elif head == _RECORD_START:
            for frame in _frames(file, max_record_bytes):
                yield from _parse(frame, frame.start, frame.end - frame.start, max_record_bytes)
        else:
            raise DataError(f"{path} begins with {head!r}; expected gzip or {_RECORD_START!r}")


def read_member(path: Path, offset: int, length: int) -> Iterator[Record | Damaged]:
    """Yield the records of one member, given its place in the file, without reading the rest."""
    with ByteFile(path) as file:
        limit = file.size * 1032 + MAX_RECORD_BYTES  # more than deflate can make of the file
        if file.read(offset, len(GZIP.magic)) == GZIP.magic:
            yield from _read_gzip_member(file, scan(file, GZIP, offset), limit)
            return
        for frame in _frames(InMemory(file.read(offset, length)), limit):
            yield from _parse(frame, offset, length, limit)


def _read_gzip(file: ByteFile, limit: int) -> Iterator[Record | Damaged]:
    offset = 0
    while offset < file.size:
        member = scan(file, GZIP, offset)
        if member.damage:
            member = member._replace(end=_next_member(file, offset + 1))
        yield from _read_gzip_member(file, member, limit)
        offset = member.end


def _read_gzip_member(file: ByteFile, member: Member, limit: int) -> Iterator[Record | Damaged]:
    length = member.end - member.offset
    if member.damage:
        yield Damaged(member.offset, length, f"gzip {member.damage}")
        return
    data: Readable = (
        Inflated(file, GZIP, member) if member.content is None else InMemory(member.content)
    )
    for frame in _frames(data, limit):
        yield from _parse(frame, member.offset, length, limit)


def _next_member(file: ByteFile, start: int) -> int:
    """Return where the next gzip member that begins with a WARC header stands, or the end."""
    while (start := find(file, GZIP.magic, start)) >= 0:
        try:
            window = file.read(start, _WINDOW_BYTES)
            if zlib.decompressobj(31).decompress(window, len(_RECORD_START)) == _RECORD_START:
                return start
        except zlib.error:
            pass
        start += 1
    return file.size


def _frames(data: Readable, limit: int) -> Iterator[_Frame]:
    """Yield every record in uncompressed WARC data, or why there is none at its place."""
    start = 0
    while start < data.size:
        end, damage = _record_end(data, start, limit)
        content = b""
        if damage:
            end = _next_record(data, start + 1, limit)
        elif end - start <= limit + 4:
            content = data.read(start, end - start)
        elif _PAGE_HEADER.search(data.read(start, _MAX_HEADER_BYTES).partition(b"\r\n\r\n")[0]):
            damage = f"record has {end - start} bytes, more than max_record_bytes={limit}"
        yield _Frame(start, end, content, damage)
        start = end


def _next_record(data: Readable, start: int, limit: int) -> int:
    """Return where the next record begins on a line of its own, or is whole; or the end."""
    while (start := find(data, _RECORD_START, start)) >= 0:
        if data.read(start - 2, 2) == b"\r\n" or not _record_end(data, start, limit)[1]:
            return start
        start += 1
    return data.size


def _record_end(data: Readable, start: int, limit: int) -> tuple[int, str]:
    """Return where the record at ``start`` ends, or why it does not."""
    head = data.read(start, _MAX_HEADER_BYTES)
    if not head.startswith(_RECORD_START):
        return 0, "no WARC header where a record should begin"
    header_end = head.find(b"\r\n\r\n")
    if header_end < 0:
        return 0, "WARC header has no end"
    length = _CONTENT_LENGTH.search(head, 0, header_end + 2)
    if length is None:
        return 0, "WARC header has no Content-Length"
    if len(length[1]) > _LENGTH_DIGITS:
        return 0, "record is shorter than its Content-Length"
    end = start + header_end + 4 + int(length[1])
    if end > data.size:
        return 0, "record is shorter than its Content-Length"
    if end - start <= limit:  # one that will be kept is read from its beginning, in one go
        tail = data.read(start, end + 4 - start)[end - start :]
    else:
        tail = data.read(end, 4)
    if tail == b"\r\n\r\n":
        end += 4
    elif end < data.size:
        return 0, "record is longer than its Content-Length"
    return end, ""


def _parse(frame: _Frame, offset: int, length: int, limit: int) -> Iterator[Record | Damaged]:
    """Yield the page in one record's bytes; requests, metadata and the like give none.

    ``offset`` and ``length`` are the place of the record (of its gzip member) in the file.
    """
    if frame.damage:
        yield Damaged(offset, length, frame.damage)
        return
    if not frame.content:
        return
    try:
        record = WarcRecord.from_bytes(frame.content)
        if not record.record_type & _PAGES:
            return
        status, content_type = 200, record.headers.get("Content-Type") or ""
        if record.is_http:
            record.parse_http(auto_decode="all")
            status = record.http_headers.status_code or 0
            content_type = record.http_headers.get("Content-Type") or ""
        payload = record.reader.read(limit + 1)
        if len(payload) > limit:
            yield Damaged(offset, length, f"body inflates to more than max_record_bytes={limit}")
            return
        yield Record(
            record_id=record.record_id or "",
            url=record.headers.get("WARC-Target-URI") or "",
            timestamp=record.headers.get("WARC-Date") or "",
            offset=offset,
            length=length,
            payload=payload,
            content_type=content_type,
            status=status,
        )
    except (OSError, ValueError) as error:
        yield Damaged(offset, length, f"record does not parse: {error}")
