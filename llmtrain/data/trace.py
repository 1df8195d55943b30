"""From a step of a run to the documents in its rows, and from a document to the steps that saw it.

Both ways are computed from the batch plan: forward through the windows of a step, backward through
the inverse of the permutations and of the mixture. Nothing is indexed and no torch is needed.

    content = step_content(plan, step=12)
    content[0].document, content[0].tokens        # what the first tokens of row 0 are
    sightings(plan, source=0, document=7, before_step=1000)
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from llmtrain.data.indexed import Int64Array
from llmtrain.data.order import Pieces
from llmtrain.data.plan import BatchPlan
from llmtrain.data.roles import second_starts
from llmtrain.data.store import TokenStore


class Stretch(NamedTuple):
    """Tokens of one document that stand together in one row of a step, as inputs.

    The target of each is the next token of the document; none where the document ends. Of a
    document that holds a pair each text is a stretch of its own.
    """

    step: int
    """0-based step."""
    row: int
    """Row of the global batch."""
    inputs: tuple[int, int]
    """Inputs [start, end) of the row."""
    source: int
    """Index of the source in the plan."""
    epoch: int
    """How often the source had been read through before, 0-based."""
    window: int
    """Window of the source the row was cut from."""
    document: int
    """Document of the source's store."""
    tokens: tuple[int, int]
    """Tokens [start, end) of the document, its EOS included."""


class Rows(NamedTuple):
    """How the rows of a step are shared out."""

    num_rows: int
    """Rows of the global batch."""
    sequence_length: int
    """Inputs of a row."""
    rows_per_unit: int
    """Rows that one window gives."""


def rows_of(plan: BatchPlan, step: int) -> Rows:
    """Return the shape of the global batch of 0-based step ``step``."""
    shape = plan.steps.shape(step)
    per_unit = plan.steps.unit_tokens // shape.sequence_length
    return Rows(shape.num_units * per_unit, shape.sequence_length, per_unit)


def step_content(plan: BatchPlan, step: int, rows: range | None = None) -> list[Stretch]:
    """Return what stands in the rows of 0-based step ``step``, in order of rows and inputs.

    ``rows`` are consecutive rows to look at, by default all. Inputs that no stretch covers are
    padding.
    """
    shape, chosen = rows_of(plan, step), plan.windows(step)
    rows = range(shape.num_rows) if rows is None else rows
    units = np.arange(rows.start // shape.rows_per_unit, -(-rows.stop // shape.rows_per_unit))
    found: list[Stretch] = []
    for source in np.unique(chosen.sources[units]).tolist():
        own = units[chosen.sources[units] == source]
        pieces = plan.orders[source].pieces(chosen.windows[own])
        for unit, offset, tokens, document in _by_document(plan.orders[source].store, pieces):
            window, epoch = int(chosen.windows[own[unit]]), int(chosen.epochs[own[unit]])
            place = (step, source, epoch, window, document)
            found += _by_row(shape, int(own[unit]), offset, tokens, place)
    return sorted(s for s in found if s.row in rows)


def numbered(content: Iterable[Stretch]) -> dict[tuple[int, int], Stretch]:
    """Return (row, number in the row) -> stretch, of one step's content in order.

    Numbers are those of ``StepBatch.document_ids``: padding has one too.
    """
    found = {}
    for row, stretches in groupby(content, key=lambda stretch: stretch.row):
        number, end = 0, 0
        for stretch in stretches:
            number += stretch.inputs[0] > end  # padding before it
            found[row, number] = stretch
            number, end = number + 1, stretch.inputs[1]
    return found


def sightings(plan: BatchPlan, source: int, document: int, before_step: int) -> list[Stretch]:
    """Return where the first ``before_step`` steps saw a document, in the order they did."""
    order = plan.orders[source]
    start, end = order.store.document_span(document)
    found: list[Stretch] = []
    for window in order.windows_of(start, end).tolist():
        pieces = _within(order.pieces(np.array([window])), start, end)
        for seen in plan.steps_of(source, window, before_step):
            shape = rows_of(plan, seen.step)
            place = (seen.step, source, seen.epoch, window, document)
            for _, offset, low, length in zip(*(a.tolist() for a in pieces[:4]), strict=True):
                edges = [low, *_seconds(order.store, low, length), low + length]
                for begin, end_ in pairwise(edges):
                    tokens = (begin - start, end_ - start)
                    found += _by_row(shape, seen.unit, offset + begin - low, tokens, place)
    return sorted(found)


def _by_document(
    store: TokenStore, pieces: Pieces
) -> Iterator[tuple[int, int, tuple[int, int], int]]:
    """Cut pieces at documents: (row of the piece, offset, tokens of the document, document)."""
    for row, offset, start, length in zip(*(a.tolist() for a in pieces[:4]), strict=True):
        document = store.document_at(start)
        begins = store.document_boundaries(start, start + length).tolist()
        begins = [b for b in begins if b > start]
        first = store.document_span(document)[0]
        edges = sorted([start, *begins, *_seconds(store, start, length), start + length])
        for low, high in pairwise(edges):
            if low in begins:
                document, first = document + 1, low
            yield row, offset + low - start, (low - first, high - first), document


def _seconds(store: TokenStore, start: int, length: int) -> list[int]:
    """Return where second texts of pairs begin among some tokens."""
    if not store.has_roles:
        return []
    return [start + at for at in second_starts(store.roles(start, start + length)).tolist()]


def _by_row(
    shape: Rows, unit: int, offset: int, tokens: tuple[int, int], place: Sequence[int]
) -> Iterator[Stretch]:
    """Cut tokens that stand in a window from ``offset`` on where its rows end."""
    step, source, epoch, window, document = place
    length, (start, end) = shape.sequence_length, tokens
    while start < end:
        row, first = divmod(offset, length)
        count = min(end - start, length - first)
        yield Stretch(
            step, unit * shape.rows_per_unit + row, (first, first + count), source, epoch, window,
            document, (start, start + count),
        )  # fmt: skip
        start, offset = start + count, offset + count


def _within(pieces: Pieces, start: int, end: int) -> Pieces:
    """Return what of some pieces lies in the tokens [start, end) of the store."""
    low: Int64Array = np.maximum(pieces.start, start)
    length: Int64Array = np.minimum(pieces.start + pieces.length, end) - low
    kept = length > 0
    offset = pieces.offset + low - pieces.start
    return Pieces(pieces.row[kept], offset[kept], low[kept], length[kept])
