"""Earliest deadline first: windows of several sources in an order in which all advance evenly.

A source with count c of the w windows of a block follows a curve from 0 to c. Its window j may come
once the curve has last been at j or below and has to come by the time it first reaches j + 1. The
curves sum to the number of windows and never fall, and unit jobs with such deadlines always meet
them when the earliest one goes first (Liu and Layland, 1973; Horn, 1974), so at every window a
source is within one window of its curve.

Where shares are constant, a block is cut into pieces whose edges are rounded targets as well. Few
different pieces occur, so most of them are copied.

    earliest_deadline_order([2, 1])      # array([0, 1, 0], dtype=int32)
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush, heappushpop

import numpy as np
import numpy.typing as npt

from llmtrain.data.indexed import Int64Array
from llmtrain.data.rounding import largest_remainder, largest_remainder_on_lines

BEND_BITS = 44
"""Bits after the point of a bend; products of bends and windows then fit in 64 bits."""


SHORTEST_PIECE = 64
"""Windows in a piece of a block with constant shares; more where a source has a small share."""
MOST_IN_PIECES = 8
"""Sources that share a block in pieces; of more, too many different pieces occur."""


def steady_order(
    counts: Sequence[int], shares: Sequence[Fraction], owed: Sequence[Fraction]
) -> npt.NDArray[np.int32]:
    """Order ``counts[i]`` windows of each source i of a block in which shares are constant.

    ``owed`` is by how much targets are above counts before the block. After each piece a source has
    given its target rounded down or up.
    """
    total, on = sum(counts), [i for i, share in enumerate(shares) if share]
    length = SHORTEST_PIECE
    while length < total and min(shares[i] for i in on) * length < 2:
        length *= 2
    num_pieces = total // length
    if len(on) == 1 or len(on) > MOST_IN_PIECES or num_pieces < 2:
        return earliest_deadline_order(counts)
    ends = length * np.arange(1, num_pieces, dtype=np.int64)
    given = largest_remainder_on_lines([owed[i] for i in on], [shares[i] for i in on], ends)
    last = np.array([[counts[i] for i in on]], dtype=np.int64)
    pieces = np.diff(np.concatenate([given, last]), axis=0, prepend=np.zeros_like(last))
    kinds, kind = np.unique(pieces[:-1], axis=0, return_inverse=True)
    patterns = np.stack([_pattern(tuple(piece)) for piece in kinds.tolist()])
    rest = earliest_deadline_order(pieces[-1].tolist())
    order = np.concatenate([patterns[kind.reshape(-1)].reshape(-1), rest])
    sources: npt.NDArray[np.int32] = np.array(on, dtype=np.int32)[order]
    return sources


@lru_cache(maxsize=4096)
def _pattern(counts: tuple[int, ...]) -> npt.NDArray[np.int32]:
    return earliest_deadline_order(counts)


def earliest_deadline_order(
    counts: Sequence[int], bends: Sequence[Fraction] | None = None
) -> npt.NDArray[np.int32]:
    """Order ``counts[i]`` windows of each source i, ``sum(counts)`` < 2**17 in all.

    The curve of source i is counts[i] * x / w - bends[i] * x * (w - x) after x of the w windows;
    null ``bends``: straight lines. Bends sum to 0. Ties go to the earlier source.
    """
    total, num_sources = sum(counts), len(counts)
    active = [i for i, count in enumerate(counts) if count]
    if len(active) == 1:
        return np.full(total, active[0], dtype=np.int32)
    whole = None if bends is None else largest_remainder([b * 2**BEND_BITS for b in bends], 0)
    releases, keys = list[Int64Array](), list[Int64Array]()
    for i in active:
        if whole is None or whole[i] == 0:
            release, due = _on_a_line(counts[i], total)
        else:
            release, due = _on_a_curve(counts[i], total, whole[i])
        releases.append(release)
        keys.append(due * num_sources + i)
    return _first_due(np.concatenate(releases), np.concatenate(keys), num_sources)


def _on_a_line(count: int, total: int) -> tuple[Int64Array, Int64Array]:
    """Release and deadline of each window of a source that advances evenly."""
    j = np.arange(count, dtype=np.int64)
    return j * total // count, -(-(j + 1) * total // count)


def _on_a_curve(count: int, total: int, bend: int) -> tuple[Int64Array, Int64Array]:
    """Release and deadline of each window of a source whose curve bends, exact in integers."""
    x = np.arange(total + 1, dtype=np.int64)
    on_line, rest = np.divmod(count * x, total)
    below = bend * x * (total - x)
    sunk, part = below >> BEND_BITS, below & ((1 << BEND_BITS) - 1)
    # rest / total - part / 2**BEND_BITS, which is above -1 and below 1
    over = (rest << BEND_BITS) - part * total
    down = on_line - sunk - (over < 0)
    up = on_line - sunk + (over > 0)
    j = np.arange(count, dtype=np.int64)
    release = np.searchsorted(np.minimum.accumulate(up[::-1])[::-1], j, side="right") - 1
    due = np.searchsorted(np.maximum.accumulate(down), j + 1, side="left")
    return release.astype(np.int64), due.astype(np.int64)


def _first_due(release: Int64Array, key: Int64Array, num_sources: int) -> npt.NDArray[np.int32]:
    """Serve one job in every slot, that with the least key of those released; keys hold sources."""
    by_release = np.argsort(release, kind="stable")
    until_next = np.diff(release[by_release], append=len(release)).tolist()
    ready, order = list[int](), list[int]()
    serve = order.append
    for job, slots in zip(key[by_release].tolist(), until_next, strict=True):
        if slots == 1:
            serve(heappushpop(ready, job))
            continue
        heappush(ready, job)
        for _ in range(slots):
            serve(heappop(ready))
    return (np.array(order, dtype=np.int64) % num_sources).astype(np.int32)
