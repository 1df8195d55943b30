"""Compressed text as a row of members, so that a damaged one costs itself and nothing else.

gzip, zstd, bzip2 and xz files are rows of members (frames, streams) that inflate by themselves and
carry a check sum. A member is read to its end before any of it is believed; after a damaged one the
reader goes on at the next place from which a member inflates without fault.

    with ByteFile(path) as file:
        for member in read_members(file, CODECS[".gz"]):
            ...
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_pipeline.read.byte_file import ByteFile, find
from llmtrain.errors import DataError

KEEP_BYTES = 4 << 20
"""A member that inflates to more is not kept in memory but inflated a second time."""
_PIECE_BYTES = 1 << 20
_XZ_MEMORY_BYTES = 1 << 30
_PADDING_BYTES = 1 << 10
"""Zeros after a member that are taken for padding; more are damage."""


class Member(NamedTuple):
    """One member, or a stretch of the file that holds none."""

    offset: int
    """Where it begins in the file, in bytes."""
    end: int
    """Where it ends."""
    size: int = 0
    """Bytes it inflates to."""
    content: bytes | None = None
    """What it inflates to, where that is no more than was asked for."""
    damage: str = ""
    """What is wrong with it."""
    cut: bool = False
    """The file ends inside it."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How one kind of compression is undone."""

    magic: bytes
    """What a member with content begins with."""
    begin: Callable[[], Any]
    """Makes a decompressor for one member."""
    feed: Callable[[Any, bytes], Iterator[bytes]]
    """Inflates a stretch of a member, some of the result at a time."""
    errors: tuple[type[Exception], ...]
    """What the decompressor raises for damage."""
    step_bytes: int = 16 << 10
    """Bytes inflated at once; decides what a file made to be small may grow to in memory."""


def _feed_zlib(inflater: Any, data: bytes) -> Iterator[bytes]:
    piece = inflater.decompress(data, _PIECE_BYTES)
    yield piece
    while not inflater.eof and (len(piece) == _PIECE_BYTES or inflater.unconsumed_tail):
        piece = inflater.decompress(inflater.unconsumed_tail, _PIECE_BYTES)
        yield piece


def _feed_stream(inflater: Any, data: bytes) -> Iterator[bytes]:
    yield inflater.decompress(data, _PIECE_BYTES)
    while not inflater.eof and not inflater.needs_input:
        yield inflater.decompress(b"", _PIECE_BYTES)


def _feed_zstd(inflater: Any, data: bytes) -> Iterator[bytes]:
    yield inflater.decompress(data)


def _zstd() -> Codec:
    import zstandard

    return Codec(
        b"\x28\xb5\x2f\xfd",
        lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
        _feed_zstd,
        (zstandard.ZstdError,),
        step_bytes=1 << 10,
    )


GZIP = Codec(b"\x1f\x8b\x08", lambda: zlib.decompressobj(31), _feed_zlib, (zlib.error,))
_BZIP2 = Codec(b"BZh", bz2.BZ2Decompressor, _feed_stream, (OSError,))
_XZ = Codec(
    b"\xfd7zXZ\0",
    lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES),
    _feed_stream,
    (lzma.LZMAError,),
)
CODECS: dict[str, Callable[[], Codec]] = {
    ".gz": lambda: GZIP, ".zst": _zstd, ".bz2": lambda: _BZIP2, ".xz": lambda: _XZ,
}  # fmt: skip
"""Ending of a file name -> how it is compressed."""


def read_members(file: ByteFile, codec: Codec) -> Iterator[Member]:
    """Yield the members of a file in order, and the stretches that hold none."""
    offset = 0
    while offset < file.size:
        member = scan(file, codec, offset)
        if member.damage:
            following = _next_whole(file, codec, offset + 1)
            end = file.size if following is None else following.offset
            yield member._replace(end=end)
            if following is None:
                return
            member = following
        yield member
        offset = _after_padding(file, member.end)


def scan(file: ByteFile, codec: Codec, offset: int, keep_bytes: int = KEEP_BYTES) -> Member:
    """Inflate the member at ``offset`` to its end, keeping at most ``keep_bytes`` of it."""
    inflater = codec.begin()
    kept: list[bytes] = []
    size, position = 0, offset
    try:
        while not inflater.eof and position < file.size:
            chunk = file.read(position, codec.step_bytes)
            if not chunk:
                break
            position += len(chunk)
            for piece in codec.feed(inflater, chunk):
                size += len(piece)
                if size <= keep_bytes:
                    kept.append(piece)
    except codec.errors as error:
        return Member(offset, position, damage=f"member is damaged: {error}")
    if not inflater.eof:
        return Member(offset, position, damage="file ends inside a member", cut=True)
    content = b"".join(kept) if size <= keep_bytes else None
    return Member(offset, position - len(inflater.unused_data), size, content)


class Inflated:
    """The content of a large member, read mostly forwards; going back inflates it again."""

    def __init__(self, file: ByteFile, codec: Codec, member: Member) -> None:
        """Nothing is inflated before the first read."""
        self.size = member.size
        self._file, self._codec, self._member = file, codec, member
        self._restart()

    def _restart(self) -> None:
        self._pieces = inflate(self._file, self._codec, self._member)
        self._start, self._buffer = 0, bytearray()

    def read(self, start: int, length: int) -> bytes:
        """Return the bytes [start, start + length), fewer at the end."""
        if start < self._start:
            self._restart()
        while self._start + len(self._buffer) < start + length:
            if start > self._start:
                gone = min(start - self._start, len(self._buffer))
                del self._buffer[:gone]
                self._start += gone
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._buffer += piece
        skip = start - self._start
        return bytes(self._buffer[skip : skip + length])


def inflate(file: ByteFile, codec: Codec, member: Member) -> Iterator[bytes]:
    """Yield what a whole member holds, a piece at a time.

    Raises:
        DataError: the file has become shorter.
    """
    if member.content is not None:
        yield member.content
        return
    inflater, position = codec.begin(), member.offset
    while not inflater.eof:
        chunk = file.read(position, codec.step_bytes)
        if not chunk:
            raise DataError("an input was cut while it was read; give the command again")
        position += len(chunk)
        yield from codec.feed(inflater, chunk)


def _next_whole(file: ByteFile, codec: Codec, start: int) -> Member | None:
    """Return the next member that inflates without fault."""
    while (start := find(file, codec.magic, start)) >= 0:
        member = scan(file, codec, start)
        if not member.damage:
            return member
        start += 1
    return None


def _after_padding(file: ByteFile, offset: int) -> int:
    """Return where the zeros that may follow a member end."""
    zeros = file.read(offset, _PADDING_BYTES)
    return offset + len(zeros) - len(zeros.lstrip(b"\0"))
