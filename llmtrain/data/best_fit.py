"""Best-fit decreasing bin packing of documents into rows, all documents of a length at once.

The longest document comes first; each goes into the row with the least room that still takes it,
and opens a new row where none does (arXiv:2404.10830, section 3). What counts is the length alone,
so every move places one length into all rows of one room: a document that fits leaves its row with
the least room of all, so it takes the next one too, as long as it can. A document longer than a row
is cut into whole rows and a rest first.

    pack_documents(np.array([7, 3, 2, 2]), row_length=4).num_rows
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.data.indexed import Int64Array


class PackedRows(NamedTuple):
    """Pieces of documents in rows, sorted by row and offset, each piece of one document."""

    row: Int64Array
    """Row of each piece; rows are numbered from 0 without gaps."""
    offset: Int64Array
    """First position of the piece in its row."""
    start: Int64Array
    """First token of the piece, counted from the first token of the first document."""
    length: Int64Array
    """Tokens of the piece."""
    ends_document: npt.NDArray[np.bool_]
    """Whether the piece holds the last token of its document."""

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return int(self.row[-1]) + 1 if len(self.row) else 0


def pack_documents(lengths: Int64Array, row_length: int) -> PackedRows:
    """Pack documents of ``lengths`` > 0 tokens, one behind the other, into rows of ``row_length``.

    Equal lengths keep the order of the documents, so the result is a function of the arguments.
    """
    start, length, ends_document = _cut(lengths, row_length)
    order = np.argsort(-length, kind="stable")
    row_of = np.empty(len(length), dtype=np.int64)
    row_of[order] = best_fit(length[order], row_length)
    order = order[np.argsort(row_of[order], kind="stable")]  # by row, the longest first
    row, length = row_of[order], length[order]
    before = np.cumsum(length) - length
    first = np.flatnonzero(np.diff(row, prepend=-1))
    offset = before - np.repeat(before[first], np.diff(first, append=len(row)))
    return PackedRows(row, offset, start[order], length, ends_document[order])


def _cut(
    lengths: Int64Array, row_length: int
) -> tuple[Int64Array, Int64Array, npt.NDArray[np.bool_]]:
    """Return start, length and end mark of the pieces that fit into a row, in document order."""
    counts = -(-lengths // row_length)
    last = np.cumsum(counts) - 1
    length = np.full(counts.sum(), row_length, dtype=np.int64)
    length[last] = lengths - (counts - 1) * row_length
    ends_document = np.zeros(len(length), dtype=np.bool_)
    ends_document[last] = True
    return np.cumsum(length) - length, length, ends_document


def best_fit(lengths: Int64Array, row_length: int) -> Int64Array:
    """Return the row of each piece; ``lengths`` fall, none is above ``row_length``."""
    packer = _Packer(row_length)
    firsts = np.flatnonzero(np.diff(lengths, prepend=-1))
    counts = np.diff(firsts, append=len(lengths))
    for length, count in zip(lengths[firsts].tolist(), counts.tolist(), strict=True):
        packer.place(length, count)
    return np.array(packer.row_of, dtype=np.int64)


class _Packer:
    """Rows by the room they have left."""

    def __init__(self, row_length: int) -> None:
        self.row_of: list[int] = []
        self._row_length = row_length
        self._num_rows = 0
        self._rooms: list[int] = []  # that some row has left, rising
        self._rows: dict[int, list[int]] = {}  # room -> rows with exactly that

    def place(self, length: int, count: int) -> None:
        """Place ``count`` pieces of ``length``, shorter ones than all before or of equal length."""
        at = bisect_left(self._rooms, length)
        while count and at < len(self._rooms):
            room = self._rooms[at]
            rows = self._rows[room]
            each = room // length
            needed = -(-count // each)
            if needed < len(rows):
                self._fill(rows[-needed:], room, length, count)
                del rows[-needed:]
                return
            del self._rooms[at], self._rows[room]
            placed = min(count, each * len(rows))
            self._fill(rows, room, length, placed)
            count -= placed
            at = bisect_left(self._rooms, length)
        if count:
            opened = -(-count // (self._row_length // length))
            rows = list(range(self._num_rows, self._num_rows + opened))
            self._num_rows += opened
            self._fill(rows, self._row_length, length, count)

    def _fill(self, rows: list[int], room: int, length: int, count: int) -> None:
        """Put ``count`` pieces into ``rows``, as many as fit into each; the last may take fewer."""
        each = room // length
        full, rest = divmod(count, each)
        for row in rows[:full] if each > 1 else ():
            self.row_of += [row] * each
        if each == 1:
            self.row_of += rows[:full]
        if full:
            self._add(room - each * length, rows[:full])
        if rest:
            self.row_of += [rows[full]] * rest
            self._add(room - rest * length, rows[full:])

    def _add(self, room: int, rows: list[int]) -> None:
        if not room:
            return
        known = self._rows.get(room)
        if known is None:
            self._rows[room] = rows
            insort(self._rooms, room)
        else:
            known += rows
