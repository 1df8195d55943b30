"""Paragraph deduplication: paragraphs that mostly consist of n-grams seen before go.

A paragraph is a line; its n-grams are those of its normalised words, each once. An n-gram counts as
seen if it stands in an earlier paragraph of the corpus, kept or not, or if the Bloom filter takes
it for one that does. A filter that all workers share would depend on who comes first, so n-grams
are parted by the first bits of their hashes: one task takes a part through the whole corpus in its
order, with a filter of its own, and answers one bit per n-gram. What comes out depends on the
corpus and on the number of parts, which comes from its size and the memory, never on workers.

    emit_ngrams(folder, "corpus", shard, index, ngram=13, parts=8)
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.dedup.bloom import Bloom, filter_bytes
from data_pipeline.dedup.cuts import cut, documents_at, empty, write_verdicts
from data_pipeline.dedup.keyed import tables_of
from data_pipeline.dedup.losers import line_ranges, shard_sink, work_of
from data_pipeline.dedup.minhash import MinHasher, MinHashPreset
from data_pipeline.dedup.sorted_runs import limit_bytes, write_array
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard
from data_pipeline.step import Verdict

UInt64Array = npt.NDArray[np.uint64]
BYTES_PER_NGRAM = 4
"""Text per n-gram, at least about: words of 3 letters, or characters of 3 bytes and some marks."""


def num_parts(text_bytes: int, false_positive_rate: float, memory_bytes: int) -> int:
    """Return into how many parts n-grams go so that a filter takes a quarter of the memory."""
    size = filter_bytes(text_bytes // BYTES_PER_NGRAM, false_positive_rate)
    return 1 << (max(1, -(-4 * size // memory_bytes)) - 1).bit_length()


@lru_cache(maxsize=2)
def _hasher(ngram: int) -> MinHasher:
    """Return what cuts paragraphs into n-grams of words; a worker keeps it."""
    return MinHasher(MinHashPreset(unit="word", shingle=ngram, bands=1, rows=1))


def paragraph_ngrams(text: str, ngram: int) -> Iterator[tuple[int, UInt64Array]]:
    """Yield (number of the line, its different n-grams, sorted) of lines that are long enough."""
    hasher = _hasher(ngram)
    for number, line in enumerate(text.split("\n")):
        if len(line) >= ngram:
            hashes = hasher.ngrams(line)
            if len(hashes):
                yield number, np.unique(hashes)


def _parts_of(hashes: UInt64Array, parts: int) -> npt.NDArray[np.int64]:
    """Return the part of each n-gram: its first bits; ``parts`` is a power of two."""
    bits = parts.bit_length() - 1
    if bits == 0:
        return np.zeros(len(hashes), np.int64)
    return (hashes >> np.uint64(64 - bits)).astype(np.int64)


def emit_ngrams(
    folder: Path, out: str, shard: Shard, index: int, ngram: int, parts: int
) -> TaskResult:
    """Write the n-grams of a shard in the order of the text, one file per part."""
    names = [f"work/ngrams-{index:05d}-{part:04d}.bin" for part in range(parts)]
    counts = [0] * parts
    (folder / "work").mkdir(parents=True, exist_ok=True)
    files = [(folder / name).open("wb") for name in names]
    for _, table in tables_of(out, shard, ("text",)):
        found = [
            hashes
            for text in table.column("text").to_pylist()
            for _, hashes in paragraph_ngrams(text, ngram)
        ]
        hashes = np.concatenate(found) if found else np.empty(0, np.uint64)
        which = _parts_of(hashes, parts)
        for part, file in enumerate(files):
            mine = hashes[which == part]
            counts[part] += len(mine)
            file.write(mine.astype("<u8").tobytes())
    for file in files:
        file.flush()
        os.fsync(file.fileno())
        file.close()
    return TaskResult(
        work={name: 8 * count for name, count in zip(names, counts, strict=True)},
        details={"counts": counts},
    )


def find_seen(
    folder: Path, stage_folder: str, part: int, counts: Sequence[int], rate: float,
    memory_bytes: int,
) -> TaskResult:  # fmt: skip
    """Write one bit per n-gram of a part, shard by shard: whether it has been seen before.

    ``counts`` are its n-grams in every shard. A part whose filter would take more than a quarter of
    the memory goes through the corpus several times, each time with the n-grams of further bits.
    """
    work = Path(stage_folder) / "work"
    passes = 1 << (max(1, -(-4 * filter_bytes(sum(counts), rate) // memory_bytes)) - 1).bit_length()
    names = [f"work/seen-{index:05d}-{part:04d}.bin" for index in range(len(counts))]
    for turn in range(passes):
        bloom = Bloom(-(-sum(counts) // passes), rate)
        for index, name in enumerate(names):
            path = work / f"ngrams-{index:05d}-{part:04d}.bin"
            before = np.fromfile(folder / name, np.uint8) if turn else None
            bits = _answer(bloom, path, counts[index], (turn, passes), memory_bytes)
            write_array(folder / name, [bits if before is None else bits | before])
    sizes = {name: (folder / name).stat().st_size for name in names}
    return TaskResult(work=sizes, details={"passes": passes})


def _answer(
    bloom: Bloom, path: Path, count: int, turn: tuple[int, int], memory_bytes: int
) -> npt.NDArray[np.uint8]:
    """Put the n-grams of one shard that are due in this turn to the filter; return the bits."""
    step = limit_bytes(memory_bytes) // 8 // 8 * 8
    answers = []
    for start in range(0, count, step):
        hashes = np.fromfile(path, "<u8", count=min(step, count - start), offset=8 * start)
        due = (hashes & np.uint64(turn[1] - 1)) == np.uint64(turn[0])
        seen = np.zeros(len(hashes), bool)
        seen[due] = bloom.add(hashes[due])
        answers.append(np.packbits(seen))
    return np.concatenate(answers) if answers else np.empty(0, np.uint8)


class _Seen:
    """Reads the bits of one shard in the order its n-grams were written."""

    def __init__(self, work: Path, index: int, parts: int) -> None:
        self._parts = parts
        self._bits = [
            np.fromfile(work / f"seen-{index:05d}-{part:04d}.bin", np.uint8)
            for part in range(parts)
        ]
        self._next = np.zeros(parts, np.int64)

    def count(self, hashes: UInt64Array) -> int:
        """Return how many of the next n-grams have been seen before; sorted, so parts follow."""
        numbers = np.bincount(_parts_of(hashes, self._parts), minlength=self._parts)
        total = 0
        for part in np.flatnonzero(numbers).tolist():
            start = int(self._next[part])
            end = start + int(numbers[part])
            bits = np.unpackbits(self._bits[part][start // 8 : -(-end // 8)])
            total += int(bits[start % 8 : start % 8 + end - start].sum())
            self._next[part] = end
        return total


def drop_paragraphs(
    folder: Path, stage: str, out: str, shard: Shard, index: int, ngram: int, share: float,
    parts: int,
) -> TaskResult:  # fmt: skip
    """Delete the paragraphs of which ``share`` or more has been seen; empty documents go.

    Reason: ``paragraph_dedup.empty``.
    """
    sink = shard_sink(folder, stage, shard)
    seen = _Seen(work_of(out, stage), index, parts)
    for _, table in tables_of(out, shard):
        gone: dict[int, list[int]] = {}
        for row, text in enumerate(table.column("text").to_pylist()):
            for number, hashes in paragraph_ngrams(text, ngram):
                if seen.count(hashes) >= share * len(hashes):
                    gone.setdefault(row, []).append(number)
        rows = list(gone)
        verdicts: dict[int, Verdict] = {}
        for row, document in zip(rows, documents_at(table, rows), strict=True):
            ranges = line_ranges(document.text, gone[row])
            verdicts[row] = cut(document, ranges, "paragraph_dedup", empty)
        write_verdicts(sink, table, verdicts)
    return sink.close()
