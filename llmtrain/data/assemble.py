"""From windows of token stores to the tensors of a step: targets, positions, document ids, weights.

Windows are made of pieces of stores; rows are equal slices of windows, in order. Document
boundaries come from the index of the store, and where a document holds a pair from its roles, never
from a token. A target that belongs to another document than its input, or that its role does not
answer for, is no target; positions and document ids restart in every row. Inputs that no piece
covers are padding: token 0, no target, a document id of their own.

    assemble_windows(plan.orders, chosen.sources, chosen.windows, unit_tokens=4096,
                     sequence_length=1024, num_microbatches=2)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmtrain.data.batch import IGNORE_INDEX, StepBatch
from llmtrain.data.fim import FillInMiddle, Stretches
from llmtrain.data.indexed import Int64Array, TokenArray
from llmtrain.data.order import Pieces, SourceOrder
from llmtrain.data.roles import ANSWER, SECOND, RoleArray
from llmtrain.data.store import TokenStore

Int32Array = npt.NDArray[np.int32]

GATHER_BELOW = 256
"""Pieces of fewer tokens are read by index, all of a shard at once; longer ones slice by slice."""
WINDOWS_AT_ONCE = 64
"""Whole windows are read so many at a time: once, and converted twice from the cache."""


def assemble_windows(
    orders: Sequence[SourceOrder],
    sources: Int32Array,
    windows: Int64Array,
    *,
    unit_tokens: int,
    sequence_length: int,
    num_microbatches: int,
    epochs: Int64Array | None = None,
    fim: FillInMiddle | None = None,
    num_units: int | None = None,
) -> StepBatch:
    """Return the rows of windows ``windows[u]`` of source ``sources[u]``, [U * k, S] tokens.

    A window of ``unit_tokens`` gives k = unit_tokens // ``sequence_length`` rows. ``epochs[u]``,
    null for the first, is read by ``fim`` alone. Rows of padding make ``num_units`` of fewer
    windows. ``fim`` leaves documents with roles as they are.
    """
    parts = []
    for source in np.unique(sources).tolist():
        units = np.flatnonzero(sources == source)
        pieces = orders[source].pieces(windows[units])
        parts.append((orders[source].store, pieces._replace(row=units[pieces.row])))
    shown = np.zeros(len(sources) if num_units is None else num_units, dtype=np.int32)
    shown[: len(sources)] = sources
    rows = _Rows(len(shown) * unit_tokens, sequence_length)
    starts = _fill(rows, parts, unit_tokens)
    plain = [pieces for store, pieces in parts if not store.has_roles]
    if fim is not None and plain:
        documents = _stretches(plain, starts, unit_tokens, rows.total)
        unit = documents.place // unit_tokens
        epoch = np.zeros_like(unit) if epochs is None else epochs[unit]
        ends = rows.targets[documents.place + documents.length - 1] == IGNORE_INDEX
        rows.without_target(
            fim.apply(documents, sources[unit], epoch, ends, rows.tokens, rows.targets)
        )
    return rows.batch(np.repeat(shown, unit_tokens // sequence_length), num_microbatches)


def assemble_pieces(
    parts: Sequence[tuple[TokenStore, Pieces]],
    sources: Int32Array,
    *,
    sequence_length: int,
    num_microbatches: int,
) -> StepBatch:
    """Return a row of source ``sources[r]`` for every row that pieces of stores are placed in."""
    rows = _Rows(len(sources) * sequence_length, sequence_length)
    _fill(rows, parts, sequence_length)
    return rows.batch(sources, num_microbatches)


class _Rows:
    """The arrays of a batch, all rows one behind the other, in one piece of memory.

    The allocator gives the pages of several large arrays back to the system when a batch is
    freed, and getting them again costs more than filling them; one piece it keeps.
    """

    def __init__(self, total: int, sequence_length: int) -> None:
        self.total = total
        self.shape = (total // sequence_length, sequence_length)
        memory = np.empty(28 * total, dtype=np.uint8)
        wide, narrow = memory[: 16 * total].view(np.int64), memory[16 * total :].view(np.int32)
        self.tokens, self.targets = wide[:total], wide[total:]
        self.positions, self.document_ids = narrow[:total], narrow[total : 2 * total]
        self.loss_weight = narrow[2 * total :].view(np.float32)
        self.loss_weight.fill(1.0)

    def without_target(self, places: Int64Array) -> None:
        """Take away the targets of some inputs."""
        self.targets[places] = IGNORE_INDEX
        self.loss_weight[places] = 0.0

    def batch(self, sources: Int32Array, num_microbatches: int) -> StepBatch:
        """Return the rows as tensors over the same memory."""
        names = ("tokens", "targets", "positions", "document_ids", "loss_weight")
        tensors: dict[str, Any] = {
            name: torch.from_numpy(getattr(self, name).reshape(self.shape)) for name in names
        }
        return StepBatch(
            **tensors,
            source_ids=torch.from_numpy(sources.astype(np.int32)),
            num_microbatches=num_microbatches,
        )


def _fill(rows: _Rows, parts: Sequence[tuple[TokenStore, Pieces]], unit_tokens: int) -> Int64Array:
    """Fill all arrays; returns where documents, parts of them and paddings begin, rising."""
    begins, ends, boundaries, silent = [], [], [], []
    for store, pieces in parts:
        place = pieces.row * unit_tokens + pieces.offset
        _read(store, pieces, place, rows, unit_tokens)
        begins.append(place)
        ends.append(place + pieces.length)
        boundaries.append(_boundaries(store, pieces, place))
        if store.has_roles:
            unanswered, seconds = _roles(store, pieces, place)
            silent.append(unanswered)
            boundaries.append(seconds)
    gaps, padding = _gaps(np.concatenate([*begins, [rows.total]]), np.concatenate([[0], *ends]))
    rows.tokens[padding] = 0
    rows.without_target(np.concatenate([*(found - 1 for found in boundaries), *silent, padding]))
    edges = np.arange(0, rows.total + 1, rows.shape[1])
    places = np.sort(np.concatenate([edges, *begins, *boundaries, gaps]))
    starts = places[:-1][places[:-1] < places[1:]]  # each once, and not the end of all rows
    _number(starts, rows.positions.reshape(rows.shape), rows.document_ids.reshape(rows.shape))
    return starts


def _read(
    store: TokenStore, pieces: Pieces, place: Int64Array, rows: _Rows, unit_tokens: int
) -> None:
    """Copy every piece to ``place`` of the tokens, and from one token later to the targets.

    Whatever the last input of the store gets as target, the boundary behind it takes away.
    """
    store.fetch(pieces.start, pieces.length + 1)
    shard_of = np.searchsorted(store.shard_starts, pieces.start, side="right") - 1
    inside = pieces.start + pieces.length < store.shard_starts[shard_of + 1]
    short = inside & (pieces.length < GATHER_BELOW)
    for shard in np.unique(shard_of[short]).tolist():
        chosen = np.flatnonzero(short & (shard_of == shard))
        length = pieces.length[chosen]
        among = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        index = np.repeat(pieces.start[chosen] - store.shard_starts[shard], length) + among
        to = np.repeat(place[chosen], length) + among
        data = store.shards[shard].data
        rows.tokens[to] = data[index]
        rows.targets[to] = data[index + 1]
    whole = ~short & (pieces.length == unit_tokens)
    units, rest = np.flatnonzero(whole), np.flatnonzero(~(short | whole))
    for first in range(0, len(units), WINDOWS_AT_ONCE):
        chosen = units[first : first + WINDOWS_AT_ONCE]
        read = np.concatenate(_windows(store, pieces, chosen)).reshape(-1, unit_tokens + 1)
        rows.tokens.reshape(-1, unit_tokens)[pieces.row[chosen]] = read[:, :-1]
        rows.targets.reshape(-1, unit_tokens)[pieces.row[chosen]] = read[:, 1:]
    for at, window in zip(place[rest].tolist(), _windows(store, pieces, rest), strict=True):
        end = at + len(window) - 1
        rows.tokens[at:end] = window[:-1]
        rows.targets[at:end] = window[1:]


def _windows(store: TokenStore, pieces: Pieces, chosen: Int64Array) -> list[TokenArray]:
    """Return the tokens of some pieces and the one behind each; behind the store that is a 0."""
    start, end = pieces.start[chosen], (pieces.start + pieces.length)[chosen] + 1
    shard_of = np.searchsorted(store.shard_starts, start, side="right") - 1
    base, inside = store.shard_starts[shard_of], end <= store.shard_starts[shard_of + 1]
    shards, columns = store.shards, (shard_of, start, end, base, inside)
    return [
        shards[shard].data[low - edge : high - edge] if whole else _across(store, low, high)
        for shard, low, high, edge, whole in zip(*(c.tolist() for c in columns), strict=True)
    ]


def _across(store: TokenStore, start: int, end: int) -> TokenArray:
    """Return tokens of more than one shard, or the last ones of the store and a 0."""
    found = store.tokens(start, min(end, store.num_tokens))
    return found if end <= store.num_tokens else np.append(found, found.dtype.type(0))


def _boundaries(store: TokenStore, pieces: Pieces, place: Int64Array) -> Int64Array:
    """Return the places, one behind an input of a piece, where its document has ended.

    A document that begins at the first input of a piece is no boundary inside it.
    """
    if pieces.ends_document is not None:
        return (place + pieces.length)[pieces.ends_document]
    at_end = pieces.start + pieces.length == store.num_tokens
    found = [(place + pieces.length)[at_end]]
    for length in np.unique(pieces.length).tolist():
        chosen = np.flatnonzero(pieces.length == length)
        row, offset = store.boundaries(pieces.start[chosen] + 1, length)
        found.append(place[chosen[row]] + offset + 1)
    return np.concatenate(found)


def _roles(store: TokenStore, pieces: Pieces, place: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the inputs whose target is not answered for, and where second texts begin."""
    spans = zip(pieces.start.tolist(), pieces.length.tolist(), strict=True)
    roles = np.concatenate([_roles_until_behind(store, low, low + size) for low, size in spans])
    size = pieces.length + 1
    first = np.cumsum(size) - size
    where = np.arange(len(roles)) + np.repeat(place - first, size)
    unanswered, rises = (roles & ANSWER) == 0, np.diff(roles & SECOND, prepend=SECOND) == SECOND
    unanswered[first] = rises[first] = False
    return where[unanswered] - 1, where[rises]


def _roles_until_behind(store: TokenStore, start: int, end: int) -> RoleArray:
    """Return the roles of [start, end] with the token behind a piece; behind the store a 0."""
    found = store.roles(start, min(end + 1, store.num_tokens))
    return found if end < store.num_tokens else np.append(found, np.uint8(0))


def _gaps(begins: Int64Array, ends: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return where nothing was written: the first place of each gap, and every place in them."""
    begins, ends = np.sort(begins), np.sort(ends)
    empty = np.flatnonzero(begins > ends)
    length = begins[empty] - ends[empty]
    inside = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return ends[empty], np.repeat(ends[empty], length) + inside


def _number(starts: Int64Array, positions: Int32Array, document_ids: Int32Array) -> None:
    """Fill positions and document ids [R, S] of documents that begin at ``starts``, rising."""
    num_rows, length = positions.shape
    lengths = np.diff(starts, append=num_rows * length)
    row, offset = np.divmod(starts, length)
    first_of_row = np.flatnonzero(offset == 0)
    ordinal = np.arange(len(starts)) - first_of_row[row]
    narrow = np.int16 if length <= 1 << 15 else np.int32  # what is repeated stays in the cache
    document_ids.reshape(-1)[:] = np.repeat(ordinal.astype(narrow), lengths)
    origin = np.repeat(offset.astype(narrow), lengths).reshape(positions.shape)
    positions[:] = np.subtract(np.arange(length, dtype=narrow), origin, out=origin)


def _stretches(
    pieces: Sequence[Pieces], starts: Int64Array, unit_tokens: int, total: int
) -> Stretches:
    """Return what begins at ``starts``, without paddings."""
    place = np.concatenate([p.row * unit_tokens + p.offset for p in pieces])
    order = np.argsort(place)
    place = place[order]
    start = np.concatenate([p.start for p in pieces])[order]
    end = place + np.concatenate([p.length for p in pieces])[order]
    of_piece = np.searchsorted(place, starts, side="right") - 1
    filled = (of_piece >= 0) & (starts < end[of_piece])
    length = np.diff(starts, append=total)[filled]
    of_piece, starts = of_piece[filled], starts[filled]
    return Stretches(starts, length, start[of_piece] + starts - place[of_piece])
