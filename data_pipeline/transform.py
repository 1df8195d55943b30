"""The task that runs steps over one shard, a batch of documents in memory at a time.

Every document that comes in goes out to ``documents/`` or to ``dropped/`` with its reason. Texts
are changed by steps only, and a step's edit map is checked against both texts before it is
believed. What each step of a pass saw, kept and dropped is counted by itself.

    result = apply_steps(folder, "02-c4", "corpus", shard, [StepSpec("c4", ...)])
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.columns import pages_of, with_pages
from data_pipeline.document import Document, EditMap, Run, compose, identity
from data_pipeline.manifest import ConservationError, Counts, TaskResult
from data_pipeline.shards import Shard, read_batches, text_size
from data_pipeline.sink import Sink
from data_pipeline.step import Dropped, Step, Verdict, judge_all
from data_pipeline.steps import StepSpec, build_step

BATCH = 256
"""Largest number of documents a step is given at once."""


@dataclass(slots=True)
class StepCounts:
    """What one step of a pass did."""

    documents_in: int = 0
    """Documents it judged."""
    documents_out: int = 0
    """Documents it kept."""
    bytes_out: int = 0
    """UTF-8 bytes of those, as it left them."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Documents dropped, by reason."""
    deleted: dict[str, int] = field(default_factory=dict)
    """Characters deleted from documents it kept, by rule."""
    seconds: float = 0.0
    """Processor time; it never goes into a manifest."""


@dataclass(slots=True)
class Judged:
    """A page on its way through the steps of a pass."""

    original: Document
    """As it came in, as if nobody had edited it before; notes of the step that dropped it are
    added."""
    current: Document
    """As the last step left it, as if nobody had edited it before."""
    edits: EditMap | None = None
    """From its present text to the one that came in; None while they are the same."""
    counts: Counts = field(default_factory=Counts)
    """Characters deleted and inserted so far."""
    reason: str = ""
    """Why it was dropped, or nothing."""
    text_bytes: int = -1
    """UTF-8 bytes of its present text; negative until somebody asks."""

    def settle(self, rule: str, verdict: Verdict, counts: StepCounts) -> None:
        """Take a verdict on the present text."""
        if isinstance(verdict, Dropped):
            self.reason = verdict.reason
            if verdict.notes:
                metadata = {**self.original.metadata, **dict(verdict.notes)}
                self.original = self.original.changed(metadata=metadata)
            counts.dropped[verdict.reason] = counts.dropped.get(verdict.reason, 0) + 1
            return
        before, after = self.current.text, verdict.document
        if after.text != before:
            count_edit(self.counts, rule, before, after.text, after.edits, verdict.deleted)
            self.edits = after.edits if self.edits is None else compose(after.edits, self.edits)
            for name, characters in verdict.deleted.items():
                counts.deleted[name] = counts.deleted.get(name, 0) + characters
            after = after.changed(edits=identity(after.text))
            self.text_bytes = -1
        self.current = after
        counts.documents_out += 1
        if self.text_bytes < 0:
            self.text_bytes = text_size([after.text])[0]
        counts.bytes_out += self.text_bytes


def apply_steps(
    folder: Path, stage: str, out: str, shard: Shard, steps: Sequence[StepSpec]
) -> TaskResult:
    """Run steps over the documents of one shard."""
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    sink.count_in(shard.rows, shard.text_characters, shard.text_bytes)
    built = {spec.name: build_step(spec) for spec in steps}
    tally = {name: StepCounts() for name in built}
    for table in read_batches(Path(out), shard):
        for start in range(0, table.num_rows, BATCH):
            batch = table.slice(start, BATCH)
            pages = pages_of(batch)
            _write(sink, batch, pages, judge(pages, built, tally))
    result = sink.close()
    result.details = {"steps": {name: asdict(counts) for name, counts in tally.items()}}
    return result


def _write(
    sink: Sink, table: pa.Table, pages: Sequence[Document], judged: Sequence[Judged]
) -> None:
    """Write the documents of a table, whether they go on or stop here."""
    kept = [row for row, entry in enumerate(judged) if not entry.reason]
    gone = [row for row, entry in enumerate(judged) if entry.reason]
    edits: dict[int, EditMap] = {}
    for i, row in enumerate(kept):
        found = judged[row].edits
        if found is not None:
            edits[i] = found
            sink.result.counts.add(judged[row].counts)
    after = [judged[row].current for row in kept]
    sink.write_kept(with_pages(table, kept, [pages[row] for row in kept], after, edits))
    after = [judged[row].original for row in gone]
    table = with_pages(table, gone, [pages[row] for row in gone], after, {})
    sink.write_dropped(table, [judged[row].reason for row in gone])


def judge(
    pages: Sequence[Document], steps: Mapping[str, Step], tally: Mapping[str, StepCounts]
) -> list[Judged]:
    """Run steps over some pages and count what each step did.

    A step sees a text as if nobody had edited it before, so that its own runs can be checked.
    """
    judged = [Judged(page, page) for page in pages]
    left = judged
    for name, step in steps.items():
        counts, start = tally[name], time.process_time()
        counts.documents_in += len(left)
        verdicts = judge_all(step, [entry.current for entry in left])
        for entry, verdict in zip(left, verdicts, strict=True):
            entry.settle(step.name, verdict, counts)
        left = [entry for entry in left if not entry.reason]
        counts.seconds += time.process_time() - start
    return judged


def merge_steps(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Add up what tasks counted per step, as (source, steps): for the corpus and per source."""
    total: dict[str, Any] = {}
    sources: dict[str, dict[str, Any]] = {}
    for source, steps in parts:
        for name, counts in steps.items():
            for sums in (total, sources.setdefault(source, {})):
                into = sums.setdefault(name, {})
                for key, value in counts.items():
                    if key == "seconds":
                        continue
                    if isinstance(value, dict):
                        mine = into.setdefault(key, {})
                        for reason, number in value.items():
                            mine[reason] = mine.get(reason, 0) + number
                    else:
                        into[key] = into.get(key, 0) + value
    return {"steps": total, "sources": sources}


def step_seconds(results: Sequence[TaskResult]) -> dict[str, float]:
    """Return the processor time each step took in all tasks."""
    seconds: dict[str, float] = {}
    for result in results:
        for name, counts in result.details["steps"].items():
            seconds[name] = seconds.get(name, 0.0) + counts["seconds"]
    return seconds


def count_edit(
    counts: Counts, rule: str, before: str, after: str, runs: Sequence[Run], deleted: dict[str, int]
) -> None:
    """Count an edit after proving it from its runs.

    Raises:
        ConservationError: a run does not stand in both texts, or the deletions do not add up.
    """
    final_end = origin_end = covered = 0
    for final, origin, length in runs:
        inside = origin + length <= len(before)
        same = inside and after.startswith(before[origin : origin + length], final)
        if not same or final < final_end or origin < origin_end or length <= 0:
            raise ConservationError(
                f"{rule}: run {(final, origin, length)} does not stand in both texts"
            )
        final_end, origin_end, covered = final + length, origin + length, covered + length
    if sum(deleted.values()) != len(before) - covered:
        raise ConservationError(
            f"{rule}: its runs leave out {len(before) - covered} characters, its rules say "
            f"{sum(deleted.values())}"
        )
    counts.inserted += len(after) - covered
    for name, characters in deleted.items():
        counts.deleted[name] = counts.deleted.get(name, 0) + characters
