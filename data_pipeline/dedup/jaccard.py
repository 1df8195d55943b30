"""The true Jaccard similarity of documents that share a band, where it is asked for.

Without it all documents under a band key are joined to the first of them. With it, pairs are looked
at: of the documents under one key, those with the same set of shingles count as one; all pairs of
the others are candidates, or, above ``CROWD`` of them, pairs with one of the ``CROWD`` smallest set
hashes. A candidate becomes an edge if the shingle sets themselves are similar enough, so which
documents are joined depends on the documents alone, not on their order. Sets lie on disk, sorted,
and are read two at a time.

    for pairs in candidates(records, limit): ...
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import blake3
import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.dedup.sorted_runs import (
    PartWriter,
    RecordFile,
    Records,
    limit_bytes,
    split_range,
)
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard

SET_BAND = np.dtype([("key", "<u8"), ("set", "<u8"), ("document", "<u4")])
"""A band key, the hash of the document's set of shingles, the ordinal of the document."""
EDGE = np.dtype([("document", "<u4"), ("root", "<u4")])
"""Two documents of one cluster, or a pair that may be."""
CROWD = 32
"""Different documents under one key up to which all pairs are candidates."""


def settle_sets(records: Records) -> tuple[Records, Records]:
    """Return (one record per key and set, sorted; edges from the other documents to its own)."""
    ordered = records[np.lexsort((records["document"], records["set"], records["key"]))]
    first = np.ones(len(ordered), bool)
    first[1:] = (ordered["key"][1:] != ordered["key"][:-1]) | (
        ordered["set"][1:] != ordered["set"][:-1]
    )
    return ordered[first], edges_to_first(ordered["document"], first)


def edges_to_first(documents: npt.NDArray[np.uint32], first: npt.NDArray[np.bool_]) -> Records:
    """Return edges from documents to the first of their group; groups follow one another."""
    edges = np.empty(len(documents), EDGE)
    edges["document"] = documents
    edges["root"] = documents[np.flatnonzero(first)][np.cumsum(first) - 1] if len(documents) else 0
    return unique_edges(edges[edges["document"] != edges["root"]])


def unique_edges(edges: Records) -> Records:
    """Return edges in order, none twice."""
    numbers = np.unique((edges["document"].astype(np.uint64) << np.uint64(32)) | edges["root"])
    unique = np.empty(len(numbers), EDGE)
    unique["document"] = numbers >> np.uint64(32)
    unique["root"] = numbers & np.uint64(0xFFFFFFFF)
    return unique


def candidates(records: Records, limit: int) -> Iterator[Records]:
    """Yield the pairs to look at, the smaller ordinal first, about ``limit`` bytes at a time.

    ``records`` are sorted by key and set, one of each; what is yielded is sorted, none twice.
    """
    starts = np.flatnonzero(np.r_[True, records["key"][1:] != records["key"][:-1]])
    documents = records["document"]
    pairs: list[Records] = []
    size = 0
    for start, end in zip(starts, np.r_[starts[1:], len(records)], strict=True):
        group = documents[start:end]
        for i in range(min(CROWD, len(group) - 1)):
            pair = np.empty(len(group) - 1 - i, EDGE)
            pair["document"] = np.minimum(group[i], group[i + 1 :])
            pair["root"] = np.maximum(group[i], group[i + 1 :])
            pairs.append(pair)
            size += pair.nbytes
            if size >= limit:
                yield _unique(pairs)
                pairs, size = [], 0
    yield _unique(pairs)


def _unique(pairs: Sequence[Records]) -> Records:
    """Return pairs of two documents in order, none twice."""
    found = np.concatenate([np.empty(0, EDGE), *pairs])
    return unique_edges(found[found["document"] != found["root"]])


class SetWriter:
    """Writes the shingle sets of a shard: ``work/sets-*.bin``, and where each ends."""

    def __init__(self, folder: Path, index: int) -> None:
        """Begin both files."""
        (folder / "work").mkdir(parents=True, exist_ok=True)
        self._names = (f"work/sets-{index:05d}.bin", f"work/ends-{index:05d}.bin")
        self._files: list[BinaryIO] = [(folder / name).open("wb") for name in self._names]
        self._end = 0

    def add(self, shingles: npt.NDArray[np.uint64]) -> int:
        """Append a set, sorted and without repeats; return its hash."""
        content = shingles.astype("<u8").tobytes()
        self._end += len(shingles)
        self._files[0].write(content)
        self._files[1].write(self._end.to_bytes(8, "little"))
        return int.from_bytes(blake3.blake3(content).digest(length=8), "little")

    def close(self) -> dict[str, int]:
        """Return the files and their bytes."""
        work = {}
        for name, file in zip(self._names, self._files, strict=True):
            file.flush()
            os.fsync(file.fileno())
            work[name] = file.tell()
            file.close()
        return work


class SetReader:
    """Reads the shingle set of any document of a corpus."""

    def __init__(self, work: Path, shards: Sequence[Shard]) -> None:
        """Take the shards of the corpus in their order."""
        self._work = work
        self._firsts = np.cumsum([0, *(shard.rows for shard in shards)])

    def read(self, document: int) -> npt.NDArray[np.uint64]:
        """Return a set, sorted."""
        index = int(np.searchsorted(self._firsts, document, "right")) - 1
        row = document - int(self._firsts[index])
        skip = max(0, row - 1)
        ends = np.fromfile(
            self._work / f"ends-{index:05d}.bin", "<u8", count=row + 1 - skip, offset=8 * skip
        )
        start = int(ends[0]) if row else 0
        return np.fromfile(
            self._work / f"sets-{index:05d}.bin", "<u8", count=int(ends[-1]) - start,
            offset=8 * start,
        )  # fmt: skip


@compiled
def _common(one: Any, other: Any) -> int:
    """Count what two sorted arrays without repeats share."""
    i = j = count = 0
    while i < one.shape[0] and j < other.shape[0]:
        if one[i] == other[j]:
            count += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return count


def jaccard(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> float:
    """Return |A and B| / |A or B| of two sorted sets; 1 for two empty ones."""
    common = _common(one, other)
    union = len(one) + len(other) - common
    return common / union if union else 1.0


def check_pairs(
    folder: Path, stage_folder: str, shards: Sequence[Shard], index: int, threshold: float,
    memory_bytes: int,
) -> TaskResult:  # fmt: skip
    """Write an edge for every candidate pair that is similar enough and begins in one shard."""
    work = Path(stage_folder) / "work"
    first = sum(shard.rows for shard in shards[:index])
    bounds = (first, first + shards[index].rows - 1)
    files = [RecordFile(path, EDGE) for path in sorted(work.glob("pairs-*.bin"))]
    sets = SetReader(work, shards)
    writer = PartWriter(folder, f"edges-checked-{index:05d}")
    looked_at = 0
    for _, slices in split_range(files, "document", bounds, limit_bytes(memory_bytes)):
        pairs = _unique([part.read() for part in slices])
        looked_at += len(pairs)
        similar = np.zeros(len(pairs), bool)
        last, held = -1, np.empty(0, np.uint64)
        for i, (one, other) in enumerate(pairs.tolist()):
            if one != last:
                last, held = one, sets.read(one)
            similar[i] = jaccard(held, sets.read(other)) >= threshold
        writer.add(pairs[similar])
    return TaskResult(work=writer.work, details={"pairs": looked_at})
