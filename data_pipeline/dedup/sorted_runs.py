"""Sorted files of fixed-size records: external sorting and reducing under a memory limit.

Records lie in files sorted by a 64-bit key. Whatever has to see all records of a key at once reads
one range of keys from every file; a range with more records than the limit is halved, bit by bit,
and a single key with more is folded a piece at a time. A reduction takes records and returns
(those that go on, sorted by key; what it gave up), and has to be associative: reducing pieces first
must not change the outcome.

    writer = SortedWriter(folder, "keys-00003", "local-00003", "key_hi", limit_bytes, settle)
    writer.add(records)
    work = writer.close()
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.void]
Array = npt.NDArray[Any]
Reduction = Callable[[Records], tuple[Records, Array]]
"""Records -> (those that go on, sorted by key; what was given up)."""
ALL_KEYS = (0, (1 << 64) - 1)
"""First and last key of everything."""
_SHARE = 16
"""Sorting takes about four times the bytes of the records, and may take a quarter of the memory."""


def limit_bytes(memory_bytes: int) -> int:
    """Return how many bytes of records may be sorted at once."""
    return max(1 << 12, memory_bytes // _SHARE)


def num_buckets(record_bytes: int, memory_bytes: int) -> int:
    """Return how many buckets keep each below a quarter of the memory, as a power of two."""
    needed = max(1, -(-4 * record_bytes // memory_bytes))
    return 1 << (needed - 1).bit_length()


def bucket_range(bucket: int, buckets: int) -> tuple[int, int]:
    """Return the first and the last key of a bucket."""
    width = (1 << 64) // buckets
    return bucket * width, (bucket + 1) * width - 1


class RecordFile:
    """A file of sorted records that is read a slice at a time."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        """Note the number of records; nothing is held open."""
        self.path = path
        self.dtype = dtype
        self.count = path.stat().st_size // dtype.itemsize

    def read(self, start: int, end: int) -> Records:
        """Return the records [start, end)."""
        offset = start * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count=end - start, offset=offset)

    def search(self, name: str, value: int, low: int = 0, high: int | None = None) -> int:
        """Return where in [low, high) the first record stands whose field is ``value`` or more."""
        end = self.count if high is None else high
        size, position = self.dtype.itemsize, self.dtype.fields
        place, offset = position[name][:2] if position else (self.dtype, 0)
        with self.path.open("rb", buffering=0) as file:
            while low < end:
                middle = (low + end) // 2
                field = os.pread(file.fileno(), place.itemsize, middle * size + offset)
                if int.from_bytes(field, "little") < value:
                    low = middle + 1
                else:
                    end = middle
        return low


class Slice(NamedTuple):
    """Some consecutive records of a file."""

    file: RecordFile
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes."""
        return (self.end - self.start) * self.file.dtype.itemsize

    def read(self) -> Records:
        """Return the records."""
        return self.file.read(self.start, self.end)


def slices_of(files: Sequence[RecordFile], field: str, bounds: tuple[int, int]) -> list[Slice]:
    """Return of every file the records whose key lies within ``bounds``, both included."""
    result = []
    for file in files:
        start = file.search(field, bounds[0])
        result.append(Slice(file, start, file.search(field, bounds[1] + 1, start)))
    return result


def split_range(
    files: Sequence[RecordFile], field: str, bounds: tuple[int, int], limit: int
) -> Iterator[tuple[tuple[int, int], list[Slice]]]:
    """Yield ranges of keys with at most ``limit`` bytes of records, or a single key, in order."""
    slices = slices_of(files, field, bounds)
    if sum(part.size for part in slices) <= limit or bounds[0] == bounds[1]:
        yield bounds, slices
        return
    middle = (bounds[0] + bounds[1]) // 2
    yield from split_range(files, field, (bounds[0], middle), limit)
    yield from split_range(files, field, (middle + 1, bounds[1]), limit)


def reduce_slices(
    slices: Sequence[Slice], limit: int, reduction: Reduction
) -> Iterator[tuple[Records, Array]]:
    """Reduce slices of one range of keys; only the last item yielded has records that go on."""
    dtype = slices[0].file.dtype
    held: Records = np.empty(0, dtype)
    pending: list[Records] = []
    waiting = 0
    step = max(1, limit // (2 * dtype.itemsize))
    for part in slices:
        for start in range(part.start, part.end, step):
            piece = part.file.read(start, min(part.end, start + step))
            if waiting and waiting + piece.nbytes > limit:
                held, given = reduction(np.concatenate([held, *pending]))
                yield held[:0], given
                pending, waiting = [], 0
            pending.append(piece)
            waiting += piece.nbytes
    yield reduction(np.concatenate([held, *pending]))


class PartWriter:
    """Writes arrays as numbered files ``UNDER/NAME-000.bin``, none for an empty one."""

    def __init__(self, folder: Path, name: str, under: str = "work") -> None:
        """Nothing is written yet."""
        self.folder = folder
        self.stem = f"{under}/{name}"
        self.work: dict[str, int] = {}

    def add(self, array: Array) -> None:
        """Write one part."""
        if len(array):
            name = f"{self.stem}-{len(self.work):03d}.bin"
            self.work[name] = write_array(self.folder / name, [array])


def write_array(path: Path, parts: Sequence[Array]) -> int:
    """Write arrays one behind the other, durably; return the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for part in parts:
            file.write(np.ascontiguousarray(part).tobytes())
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


class SortedWriter:
    """Reduces records to one sorted file, in runs of at most ``limit`` bytes that are merged."""

    def __init__(
        self, folder: Path, name: str, given: str, field: str, limit: int, reduction: Reduction
    ) -> None:
        """Records go to ``work/NAME.bin``, what is given up to ``work/GIVEN-000.bin`` and so on."""
        self.path = folder / "work" / f"{name}.bin"
        self.given = PartWriter(folder, given)
        self.field = field
        self.limit = limit
        self.reduction = reduction
        self._pending: list[Records] = []
        self._waiting = 0
        self._runs: list[Path] = []
        self._dtype: np.dtype[Any] | None = None

    def add(self, records: Records) -> None:
        """Take records in any order."""
        self._dtype = records.dtype
        if self._waiting and self._waiting + records.nbytes > self.limit:
            self._flush()
        self._pending.append(records)
        self._waiting += records.nbytes

    def _reduce(self) -> Records:
        """Reduce what waits, write what it gives up, and return the rest."""
        kept, given = self.reduction(np.concatenate(self._pending))
        self.given.add(given)
        self._pending, self._waiting = [], 0
        return kept

    def _flush(self) -> None:
        path = self.path.with_name(f"{self.path.stem}.run-{len(self._runs):03d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reduce().tofile(path)
        self._runs.append(path)

    def close(self) -> dict[str, int]:
        """Merge the runs; return every file written, below ``folder``, and its bytes."""
        if self._dtype is None:
            write_array(self.path, [])
        elif not self._runs:
            write_array(self.path, [self._reduce()])
        else:
            self._flush()
            self._merge(self._dtype)
        return {f"work/{self.path.name}": self.path.stat().st_size, **self.given.work}

    def _merge(self, dtype: np.dtype[Any]) -> None:
        files = [RecordFile(path, dtype) for path in self._runs]
        with self.path.open("wb") as out:
            for _, slices in split_range(files, self.field, ALL_KEYS, self.limit):
                for kept, given in reduce_slices(slices, self.limit, self.reduction):
                    out.write(kept.tobytes())
                    self.given.add(given)
            out.flush()
            os.fsync(out.fileno())
        for path in self._runs:
            path.unlink()
