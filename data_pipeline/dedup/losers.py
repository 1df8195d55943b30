"""Taking out what lost: documents, lines and spans, a batch of documents in memory at a time.

The places that lost lie in files sorted by (shard, row, line); a shard's task finds its stretch in
each and reads on as its documents go by. Every document goes to ``documents/`` or ``dropped/``.

    drop_documents(folder, "03-exact", "corpus", "exact", shard, index)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.dedup.cuts import cut, documents_at, write_verdicts
from data_pipeline.dedup.keyed import PLACE, tables_of
from data_pipeline.dedup.sorted_runs import RecordFile, Records
from data_pipeline.filters.c4 import C4_VARIANTS, enough_sentences
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard
from data_pipeline.sink import Sink
from data_pipeline.step import Dropped, Verdict
from data_pipeline.text.sentence_spans import sentence_spans

Ranges = list[tuple[int, int]]
"""Stretches [start, end) of a text, in characters."""


class LostPlaces:
    """The places of one shard that lost, read a range of rows at a time."""

    def __init__(self, work: Path, index: int, *names: str, dtype: np.dtype[Any] = PLACE) -> None:
        """Look for the shard in every file ``NAME-*.bin``; records begin with (shard, row)."""
        self._dtype = dtype
        self._files: list[tuple[RecordFile, int, int]] = []
        for path in (path for name in names for path in sorted(work.glob(f"{name}-*.bin"))):
            file = RecordFile(path, dtype)
            start = file.search("shard", index)
            end = file.search("shard", index + 1, start)
            if end > start:
                self._files.append((file, start, end))

    def between(self, first: int, last: int) -> Records:
        """Return the places with first <= row < last, by row and then by the third field.

        Ranges have to be asked for one after the other, in increasing order.
        """
        parts = [np.empty(0, self._dtype)]
        for i, (file, start, end) in enumerate(self._files):
            stop = file.search("row", last, start, end)
            parts.append(file.read(start, stop))
            self._files[i] = (file, stop, end)
        found = np.concatenate(parts)
        third = (self._dtype.names or ())[2]
        return found[np.lexsort((found[third], found["row"]))]

    def by_row(self, first: int, last: int) -> dict[int, Records]:
        """Return the places of ``between`` by row, counted from ``first``."""
        found = self.between(first, last)
        rows, starts = np.unique(found["row"], return_index=True)
        parts = np.split(found, starts[1:])
        return {int(row) - first: part for row, part in zip(rows, parts, strict=False)}


def work_of(out: str, stage: str) -> Path:
    """Return the folder of what only a stage itself reads."""
    return Path(out) / "stages" / stage / "work"


def shard_sink(folder: Path, stage: str, shard: Shard) -> Sink:
    """Return the sink of a task over one shard, which it counts as read."""
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    sink.count_in(shard.rows, shard.text_characters, shard.text_bytes)
    return sink


def drop_documents(
    folder: Path, stage: str, out: str, kind: str, shard: Shard, index: int
) -> TaskResult:
    """Write the documents of a shard that won, and those that lost to ``dropped/``.

    Reasons: ``KIND.duplicate`` (in this corpus), ``KIND.known`` (in an earlier one).
    """
    sink = shard_sink(folder, stage, shard)
    work = work_of(out, stage)
    lost = {
        "duplicate": LostPlaces(work, index, f"local-{index:05d}", "lost"),
        "known": LostPlaces(work, index, "known"),
    }
    for first, table in tables_of(out, shard):
        verdicts: dict[int, Verdict] = {
            row: Dropped(f"{kind}.{rule}")
            for rule, found in lost.items()
            for row in found.by_row(first, first + table.num_rows)
        }
        write_verdicts(sink, table, verdicts)
    return sink.close()


class PartRules(NamedTuple):
    """How a stage takes parts out of documents."""

    ranges: Callable[[str, Sequence[int]], Ranges]
    """(text, numbers of the parts that lost) -> where they stand."""
    judge: Callable[[str], str | None]
    """Text that is left -> why the document goes, or None."""
    everywhere: bool
    """Whether documents that lost nothing are judged as well."""


def drop_parts(
    folder: Path, stage: str, out: str, kind: str, shard: Shard, index: int,
    options: Mapping[str, Any],
) -> TaskResult:  # fmt: skip
    """Delete the lines or spans of a shard that lost; documents with too little left are dropped.

    Reasons: ``KIND.empty``, ``KIND.few_sentences``.
    """
    rules = PARTS[kind](**options)
    sink = shard_sink(folder, stage, shard)
    lost = LostPlaces(work_of(out, stage), index, f"local-{index:05d}", "lost")
    for first, table in tables_of(out, shard):
        numbers = lost.by_row(first, first + table.num_rows)
        touched = sorted(numbers)
        verdicts: dict[int, Verdict] = {}
        for row, document in zip(touched, documents_at(table, touched), strict=True):
            ranges = rules.ranges(document.text, numbers[row]["line"].tolist())
            verdicts[row] = cut(document, ranges, kind, rules.judge)
        if rules.everywhere:
            for row, text in enumerate(table.column("text").to_pylist()):
                reason = None if row in verdicts else rules.judge(text)
                if reason is not None:
                    verdicts[row] = Dropped(f"{kind}.{reason}")
        write_verdicts(sink, table, verdicts)
    return sink.close()


def line_ranges(text: str, numbers: Sequence[int]) -> Ranges:
    """Return where some lines stand, with their newlines."""
    wanted = set(numbers)
    ranges: Ranges = []
    start = 0
    for number, line in enumerate(text.split("\n")):
        end = min(len(text), start + len(line) + 1)
        if number in wanted:
            ranges.append((start, end))
        start = end
    return ranges


def span_ranges(text: str, numbers: Sequence[int], sentences: int) -> Ranges:
    """Return where the spans stand that begin at some sentences."""
    spans = sentence_spans(text)
    return [(spans[n][0], spans[n + sentences - 1][1]) for n in numbers]


def _line_rules(variant: str) -> PartRules:
    """C4 counts the sentences of every page again, also of those that lost nothing."""
    options = C4_VARIANTS[variant]

    def judge(text: str) -> str | None:
        if not text.strip():
            return "empty"
        enough = enough_sentences(text, options.sentences, options.min_sentences)
        return None if enough else "few_sentences"

    return PartRules(line_ranges, judge, True)


def _span_rules(sentences: int, min_sentences: int) -> PartRules:
    def judge(text: str) -> str | None:
        if not text.strip():
            return "empty"
        return None if len(sentence_spans(text)) >= min_sentences else "few_sentences"

    return PartRules(partial(span_ranges, sentences=sentences), judge, False)


PARTS: Mapping[str, Callable[..., PartRules]] = {
    "line_dedup": _line_rules,
    "span_dedup": _span_rules,
}
"""By stage."""
