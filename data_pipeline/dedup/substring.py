"""Exact substring deduplication by suffix array (arXiv:2107.06499): repeats go, but for the first.

The corpus, in its order, is cut into blocks: a document belongs to block b if the UTF-8 bytes of
text before it, divided by ``block_bytes``, give b. In a block, a window of ``length`` units that
lies in one document and stands at an earlier place of the block, in any document, is a repeat; what
repeats cover goes, except where a window overlaps the first one equal to it. Windows in bytes begin
at characters, and half characters at the end of a deletion stay. Blocks come from ``block_bytes``
alone, so what goes depends neither on workers nor on shards; repeats across blocks stay.

    covered = repeated(np.frombuffer(text, np.uint8), np.array([len(text)]), 100, utf8=True)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydivsufsort

from data_pipeline.compiled import compiled
from data_pipeline.config.dedup import SUBSTRING_MEMORY
from data_pipeline.dedup.cuts import cut, documents_at, empty, write_verdicts
from data_pipeline.dedup.keyed import tables_of
from data_pipeline.dedup.losers import LostPlaces, shard_sink, work_of
from data_pipeline.dedup.sorted_runs import PartWriter, Records
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard, read_batches, text_lengths
from data_pipeline.step import Verdict
from data_pipeline.text.characters import LONE_RANGES

Unit = Literal["bytes", "tokens"]
DEFAULT_LENGTH = {"bytes": 100, "tokens": 50}
"""Shortest repeat that goes, in units."""
CUT = np.dtype([("shard", "<u4"), ("row", "<u4"), ("start", "<u4"), ("end", "<u4")])
"""A stretch of a document that goes, in characters."""
_LONE = "".join(f"{chr(low)}-{chr(high - 1)}" for low, high in LONE_RANGES)
_TOKEN = re.compile(rf"[{_LONE}]|(?:(?![{_LONE}])\w)+|[^\w\s]")


def default_block_bytes(memory_bytes: int) -> int:
    """Return the largest block that half of the memory can search."""
    return max(1 << 16, memory_bytes // (2 * SUBSTRING_MEMORY))


@compiled
def _same(symbols: Any, one: int, other: int, length: int) -> bool:
    """Whether two windows are equal and both fit."""
    if max(one, other) + length > symbols.shape[0]:
        return False
    shared = 0
    while shared < length and symbols[one + shared] == symbols[other + shared]:
        shared += 1
    return shared == length


@compiled
def _fits(symbols: Any, ends: Any, place: int, length: int, utf8: bool) -> bool:
    """Whether the window at a place lies in one document and begins at a character."""
    if utf8 and symbols[place] & 0xC0 == 0x80:
        return False
    end: int = ends[np.searchsorted(ends, place, side="right")]
    return place + length <= end


@compiled
def _mark(symbols: Any, order: Any, ends: Any, length: int, utf8: bool, change: Any) -> None:
    """Note in ``change`` where repeats begin (+1) and end (-1)."""
    count = order.shape[0]
    start = 0
    while start < count:
        end = start + 1
        while end < count and _same(symbols, order[end - 1], order[end], length):
            end += 1
        if end - start > 1:
            first = count
            for i in range(start, end):
                if order[i] < first and _fits(symbols, ends, order[i], length, utf8):
                    first = order[i]
            for i in range(start, end):
                place = order[i]
                if place != first and _fits(symbols, ends, place, length, utf8):
                    change[max(place, first + length)] += 1
                    change[place + length] -= 1
        start = end


def repeated(
    symbols: npt.NDArray[Any], ends: npt.NDArray[np.int64], length: int, *, utf8: bool
) -> npt.NDArray[np.bool_]:
    """Return which symbols of a block go, [N].

    ``symbols`` is uint8 or uint32, documents one behind the other; ``ends`` are their ends.
    """
    if len(symbols) < length:
        return np.zeros(len(symbols), bool)
    order = pydivsufsort.divsufsort(symbols)
    change = np.zeros(len(symbols) + 1, np.int32)
    _mark(symbols, order, ends, length, utf8, change)
    del order
    return np.cumsum(change[:-1], dtype=np.int32) > 0


def _runs(covered: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return [start, end) of every stretch of True."""
    edges = np.flatnonzero(np.diff(covered.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def byte_ranges(texts: Sequence[str], length: int) -> list[list[tuple[int, int]]]:
    """Return for every text of a block the stretches that go, in characters; windows in bytes."""
    contents = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.cumsum([len(content) for content in contents])
    symbols = np.frombuffer(bytearray().join(contents), np.uint8)
    covered = repeated(symbols, ends, length, utf8=True)
    result: list[list[tuple[int, int]]] = []
    for end, content in zip(ends.tolist(), contents, strict=True):
        mine = covered[end - len(content) : end]
        result.append(_characters(symbols[end - len(content) : end], mine) if mine.any() else [])
    return result


def _characters(
    content: npt.NDArray[np.uint8], covered: npt.NDArray[np.bool_]
) -> list[tuple[int, int]]:
    """Return covered stretches of whole characters, in characters."""
    begins = np.append((content & 0xC0) != 0x80, True)
    number = np.cumsum(begins) - 1
    ranges = []
    for start, end in _runs(covered):
        first = int(number[start]) + (0 if begins[start] else 1)
        last = int(number[end])
        if first < last:
            ranges.append((first, last))
    return ranges


def token_ranges(texts: Sequence[str], length: int) -> list[list[tuple[int, int]]]:
    """Return for every text of a block the stretches that go, in characters; windows in tokens.

    A token is a word, a character of a script without spaces, or a punctuation mark.
    """
    numbers: dict[str, int] = {}
    tokens: list[npt.NDArray[np.uint32]] = []
    starts: list[npt.NDArray[np.uint32]] = []
    for text in texts:
        found = [(numbers.setdefault(m[0], len(numbers)), m.start()) for m in _TOKEN.finditer(text)]
        both = np.array(found, np.uint32).reshape(-1, 2)
        tokens.append(both[:, 0])
        starts.append(np.append(both[:, 1], np.uint32(len(text))))
    symbols = np.concatenate(tokens) if tokens else np.empty(0, np.uint32)
    ends = np.cumsum([len(part) for part in tokens])
    covered = repeated(symbols, ends, length, utf8=False)
    result = []
    for end, mine in zip(ends.tolist(), starts, strict=True):
        runs = _runs(covered[end - len(mine) + 1 : end])
        result.append([(int(mine[a]), int(mine[b])) for a, b in runs])
    return result


RANGES = {"bytes": byte_ranges, "tokens": token_ranges}
"""By unit."""


def find_repeats(
    folder: Path, out: str, shards: Sequence[tuple[int, int, Shard]], block: int, block_bytes: int,
    unit: Unit, length: int,
) -> TaskResult:  # fmt: skip
    """Write the stretches of one block that go.

    ``shards`` are (number, bytes of text before it, shard) of those that reach into the block.
    """
    texts: list[str] = []
    places: list[tuple[int, int]] = []
    for index, before, shard in shards:
        row = 0
        for table in read_batches(Path(out), shard, ("text",)):
            sizes = text_lengths(table)
            begins = before + np.cumsum(sizes) - sizes
            mine = np.flatnonzero(begins // block_bytes == block)
            if len(mine):
                texts += table.column("text").take(mine).to_pylist()
                places += [(index, row + int(i)) for i in mine]
            row += table.num_rows
            before += int(sizes.sum())
            if before >= (block + 1) * block_bytes:
                break
    ranges = RANGES[unit](texts, length)
    cuts = [
        (*place, *stretch) for place, found in zip(places, ranges, strict=True) for stretch in found
    ]
    writer = PartWriter(folder, f"cuts-{block:05d}")
    writer.add(np.array(cuts, CUT))
    return TaskResult(work=writer.work)


def blocks_of(shards: Sequence[Shard], block_bytes: int) -> list[list[tuple[int, int, Shard]]]:
    """Return for every block the shards that reach into it, as ``find_repeats`` takes them."""
    total = sum(shard.text_bytes for shard in shards)
    blocks: list[list[tuple[int, int, Shard]]] = [[] for _ in range(-(-total // block_bytes))]
    before = 0
    for index, shard in enumerate(shards):
        end = before + shard.text_bytes
        for block in range(before // block_bytes, -(-end // block_bytes)):
            blocks[block].append((index, before, shard))
        before = end
    return blocks


def drop_repeats(folder: Path, stage: str, out: str, shard: Shard, index: int) -> TaskResult:
    """Delete the stretches of a shard that stand earlier; documents left empty are dropped.

    Reason: ``substring.empty``.
    """
    sink = shard_sink(folder, stage, shard)
    cuts = LostPlaces(work_of(out, stage), index, "cuts", dtype=CUT)
    for first, table in tables_of(out, shard):
        found: dict[int, Records] = cuts.by_row(first, first + table.num_rows)
        rows = sorted(found)
        verdicts: dict[int, Verdict] = {}
        for row, document in zip(rows, documents_at(table, rows), strict=True):
            ranges = list(
                zip(found[row]["start"].tolist(), found[row]["end"].tolist(), strict=True)
            )
            verdicts[row] = cut(document, ranges, "substring", empty)
        write_verdicts(sink, table, verdicts)
    return sink.close()
