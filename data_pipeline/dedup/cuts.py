"""Cutting stretches out of documents, and writing what is left without touching the rest.

text, runs = without_ranges("abcdef", [(1, 3)])  # "adef"
write_verdicts(sink, table, {7: Dropped("span_dedup.empty")})
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from data_pipeline.document import Document, Run
from data_pipeline.manifest import Counts
from data_pipeline.shards import from_table, with_documents
from data_pipeline.sink import Sink
from data_pipeline.step import Dropped, Kept, Verdict
from data_pipeline.transform import count_edit


def without_ranges(text: str, ranges: Sequence[tuple[int, int]]) -> tuple[str, list[Run]]:
    """Return the text without some stretches [start, end), and the runs that stayed.

    Ranges are in increasing order and may overlap. Where the end of the text goes, white space that
    then stands at the end goes too.
    """
    runs: list[Run] = []
    final = position = 0
    for start, end in (*ranges, (len(text), len(text))):
        if start > position:
            runs.append(Run(final, position, start - position))
            final += start - position
        position = max(position, end)
    result = "".join(text[run.extracted_start : run.extracted_start + run.length] for run in runs)
    if ranges and max(end for _, end in ranges) >= len(text):
        result = result.rstrip()
    while runs and runs[-1].final_start >= len(result):
        runs.pop()
    if runs and runs[-1].final_start + runs[-1].length > len(result):
        runs[-1] = runs[-1]._replace(length=len(result) - runs[-1].final_start)
    return result, runs


def cut(
    document: Document,
    ranges: Sequence[tuple[int, int]],
    stage: str,
    reason_to_drop: Callable[[str], str | None],
) -> Verdict:
    """Return the document without some stretches, or dropped if what is left is not enough.

    Deleted characters are counted as ``STAGE.duplicate``.
    """
    text, runs = without_ranges(document.text, ranges)
    reason = reason_to_drop(text)
    if reason is not None:
        return Dropped(f"{stage}.{reason}")
    deleted = {f"{stage}.duplicate": len(document.text) - len(text)}
    count_edit(Counts(), stage, document.text, text, runs, deleted)
    return Kept(document.edited(text, runs), deleted)


def empty(text: str) -> str | None:
    """Return ``empty`` for a text of white space."""
    return None if text.strip() else "empty"


def documents_at(table: pa.Table, rows: Sequence[int]) -> list[Document]:
    """Return some documents of a table."""
    return from_table(table.take(pa.array(rows, pa.int64())))


def write_verdicts(sink: Sink, table: pa.Table, verdicts: Mapping[int, Verdict]) -> None:
    """Write the documents of a table: row -> verdict; rows that are not named stay as they are."""
    if not verdicts:
        sink.write_kept(table)
        return
    dropped = {row: v.reason for row, v in sorted(verdicts.items()) if isinstance(v, Dropped)}
    changed = {row: v for row, v in verdicts.items() if isinstance(v, Kept)}
    gone = np.array(list(dropped), np.int64)
    sink.write_dropped(table.take(pa.array(gone)), list(dropped.values()))
    for verdict in changed.values():
        sink.result.counts.add(Counts(deleted=verdict.deleted))
    kept = np.setdiff1d(np.arange(table.num_rows), gone)
    after = with_documents(table, {row: verdict.document for row, verdict in changed.items()})
    sink.write_kept(after.take(pa.array(kept)))
