"""Lists of words, domains and addresses in files: found, digested, and held in little memory.

A list is a text file with one entry per line, plain or compressed; empty lines and those that begin
with ``#`` are no entries. Whoever loads one names its digest, so a list that changes while a run
goes on is an error. A large list is held as sorted 64-bit hashes, 8 bytes an entry: with five
million entries, one look-up in 4e12 finds what is not there.

    files = list_files(["blocklists/adult"], "domains")
    "example.com" in HashedSet.of_domains(files)
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import blake3
import numpy as np
import numpy.typing as npt
import zstandard

from data_pipeline.compiled import compiled
from data_pipeline.text.hashing import mix
from llmtrain.errors import DataError

_HOSTS_FILE = frozenset({"0.0.0.0", "127.0.0.1", "::", "::1"})
_CHUNK_BYTES = 1 << 20
_BATCH = 1 << 16
_BASE = np.uint64(0x9E3779B97F4A7C15)
_ZSTD_BYTES = 1 << 14
UNREADABLE = (
    OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, UnicodeDecodeError,
)  # fmt: skip
"""What reading a file of text may raise."""


class ListFile(NamedTuple):
    """One file of a list, as it was when the run began."""

    path: str
    """Where it is."""
    digest: str
    """blake3 of its bytes as 32 hex digits."""


def list_files(paths: Sequence[str], kind: str) -> tuple[ListFile, ...]:
    """Find the files of a list; of a folder, those below it named ``kind`` (``kind.txt``, ``.gz``).

    Raises:
        DataError: a path is missing, or a folder holds no file of this name.
    """
    names = {kind, f"{kind}.txt", f"{kind}.gz", f"{kind}.txt.gz"}
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob(f"{kind}*") if p.name in names and p.is_file())
            if not inside:
                raise DataError(
                    f"the folder {path} holds no file {kind}, {kind}.txt or {kind}.gz; name the "
                    "files of the list one by one, or rename them"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(
                f"the list {path} does not exist; give a text file with one entry per line, or a "
                f"folder with files named {kind}"
            )
    return tuple(ListFile(str(path), file_digest(path)) for path in found)


def file_digest(path: Path) -> str:
    """blake3 of a file as 32 hex digits."""
    hasher = blake3.blake3()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest(length=16)


def check_digest(file: ListFile) -> None:
    """Raise DataError if a file is no longer what it was when the run began."""
    path = Path(file.path)
    now = file_digest(path) if path.is_file() else "no file"
    if now != file.digest:
        raise DataError(
            f"{path} has changed since the run began: its digest is {now}, expected "
            f"{file.digest}; start the run again, or put the old file back"
        )


def entries(
    files: Iterable[ListFile], normalize: Callable[[str], str] = str.strip
) -> Iterator[str]:
    """Yield the normalised entries of list files, empty ones left out.

    Raises:
        DataError: a file is not UTF-8 text or gzip, or has changed since the run began.
    """
    for file in files:
        with _reading(file) as lines:
            for line in lines:
                entry = "" if line.startswith(b"#") else normalize(line.decode("utf-8-sig"))
                if entry:
                    yield entry


@contextmanager
def _reading(file: ListFile) -> Iterator[IO[bytes]]:
    """Give what is in a list file; what is wrong with it is one sentence."""
    check_digest(file)
    try:
        with open_plain(Path(file.path)) as stream:
            yield stream
    except UNREADABLE as error:
        raise DataError(
            f"the list {file.path} cannot be read ({error}); expected a UTF-8 text file with one "
            "entry per line, plain or compressed: mend it or leave it out"
        ) from error


def open_plain(path: Path) -> IO[bytes]:
    """Open a file that may be compressed (.gz, .bz2, .xz, .zst) for reading what is in it."""
    return cast(IO[bytes], _OPENERS.get(path.suffix, open)(path, "rb"))


class _ZstdFile(io.RawIOBase):
    """What is in all frames of a file; zstandard's own reader ends at a cut without a word."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._pieces = self._inflate()
        self._left = memoryview(b"")

    def _inflate(self) -> Iterator[bytes]:
        frames = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frame, data = None, b""
        while data or (data := self._file.read(_ZSTD_BYTES)):
            frame = frame or frames.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the file ends inside a frame")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open,
    ".zst": lambda path, _: io.BufferedReader(_ZstdFile(path)),
}  # fmt: skip


def domain_entry(line: str) -> str:
    """Return the domain of a line: lower case, of a hosts file the name after the address."""
    words = line.partition("#")[0].lower().split()
    if len(words) > 1 and words[0] in _HOSTS_FILE:
        del words[0]
    return words[0].removeprefix("*.").strip(".") if words else ""


@compiled
def _hash(data: Any, start: int, end: int) -> Any:
    """Return a 64-bit hash of bytes with ASCII letters in lower case."""
    state = np.uint64(end - start)
    for i in range(start, end):
        byte = data[i]
        if 65 <= byte <= 90:
            byte |= 32
        state = state * _BASE + np.uint64(byte)
    return mix(state)


@compiled
def _listed_from(data: Any, start: int, hashes: Any) -> int:
    """Return where the longest domain that is in a sorted set begins, -1 for none."""
    length = data.shape[0]
    while start < length:
        key = _hash(data, start, length)
        low = 0
        high = hashes.shape[0]
        while low < high:
            middle = (low + high) >> 1
            if hashes[middle] < key:
                low = middle + 1
            else:
                high = middle
        if low < hashes.shape[0] and hashes[low] == key:
            return start
        while start < length and data[start] != 46:
            start += 1
        start += 1
    return -1


@compiled
def _hash_lines(data: Any, keys: Any, odd: Any) -> Any:
    """Hash the lines of a chunk that are plain domains; note where the others begin and end.

    Returns (hashes written, others written, bytes read); what follows the last newline is not read.
    """
    count = 0
    others = 0
    start = 0
    plain = True
    for i in range(data.shape[0]):
        byte = data[i]
        if byte != 10:
            if not (45 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122) or byte == 47:
                plain = False
            continue
        if i > start and plain and data[start] != 46 and data[i - 1] != 46:
            keys[count] = _hash(data, start, i)
            count += 1
        elif i > start:
            odd[others, 0] = start
            odd[others, 1] = i
            others += 1
        start = i + 1
        plain = True
    return count, others, start


@dataclass(frozen=True, slots=True)
class HashedSet:
    """A set of strings as sorted 64-bit hashes; case of ASCII letters does not matter."""

    hashes: npt.NDArray[np.uint64]
    """Hash of each entry, sorted and unique."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> "HashedSet":
        """Return the set of some strings, which are never all in memory."""
        return cls._of_hashes(_batches(map(_hash_string, strings)))

    @classmethod
    def of_domains(cls, files: Iterable[ListFile]) -> "HashedSet":
        """Return the set of the domains in list files, 40 MB/s or more.

        Raises:
            DataError: a file is not UTF-8 text or gzip, or has changed since the run began.
        """
        return cls._of_hashes(part for file in files for part in _domain_hashes(file))

    @classmethod
    def _of_hashes(cls, parts: Iterable[npt.NDArray[np.uint64]]) -> "HashedSet":
        joined = np.concatenate([np.empty(0, dtype=np.uint64), *parts])
        joined.sort()
        first = np.ones(len(joined), dtype=np.bool_)
        np.not_equal(joined[1:], joined[:-1], out=first[1:])
        return cls(joined[first])

    def __contains__(self, string: str) -> bool:
        """Whether a string is in the set."""
        key = np.uint64(_hash_string(string))
        place = int(np.searchsorted(self.hashes, key))
        return place < len(self.hashes) and bool(self.hashes[place] == key)

    def domains_above(self, host: str) -> Iterator[str]:
        """Yield a host and the domains above it as far as they are in the set, longest first."""
        data = np.frombuffer(host.encode("utf-8", "surrogatepass"), dtype=np.uint8)
        start = _listed_from(data, 0, self.hashes)
        while start >= 0:
            rest = data[start:].tobytes()
            yield rest.decode("utf-8", "surrogatepass")
            dot = rest.find(b".")
            if dot < 0:
                return
            start = _listed_from(data, start + dot + 1, self.hashes)

    def __len__(self) -> int:
        """Entries."""
        return len(self.hashes)


def _hash_string(string: str) -> int:
    data = np.frombuffer(string.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    return int(_hash(data, 0, len(data)))


def _batches(hashes: Iterator[int]) -> Iterator[npt.NDArray[np.uint64]]:
    while batch := list(islice(hashes, _BATCH)):
        yield np.array(batch, dtype=np.uint64)


def _domain_hashes(file: ListFile) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield the hashes of a list of domains, a chunk of the file at a time."""
    with _reading(file) as stream:
        rest = b""
        while chunk := stream.read(_CHUNK_BYTES):
            data = np.frombuffer(rest + chunk, dtype=np.uint8)
            keys = np.empty(len(data) // 2 + 1, dtype=np.uint64)
            odd = np.empty((len(data) // 2 + 1, 2), dtype=np.int64)
            count, others, read = _hash_lines(data, keys, odd)
            yield keys[:count].copy()
            lines = (data[start:end].tobytes() for start, end in odd[:others].tolist())
            yield from _batches(_domains_in(lines))
            rest = data[read:].tobytes()
        yield from _batches(_domains_in([rest]))


def _domains_in(lines: Iterable[bytes]) -> Iterator[int]:
    for line in lines:
        entry = domain_entry(line.decode("utf-8-sig"))
        if entry:
            yield _hash_string(entry)
