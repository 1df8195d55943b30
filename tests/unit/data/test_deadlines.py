"""The fast order of a block is that of a plain heap, and every source keeps to its curve."""

from collections.abc import Sequence
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np
import pytest

from llmtrain.data.deadlines import earliest_deadline_order, steady_order
from llmtrain.data.rounding import largest_remainder

LINES = [[1], [5, 0, 1, 13, 13], [7, 3], [1, 99], [50, 50, 1], [64, 32, 16, 8, 4, 2, 1, 1]]


def curves(counts: Sequence[int], bends: Sequence[Fraction]) -> list[list[Fraction]]:
    total = sum(counts)
    return [
        [Fraction(count * x, total) - bend * x * (total - x) for x in range(total + 1)]
        for count, bend in zip(counts, bends, strict=True)
    ]


def by_heap(counts: Sequence[int], bends: Sequence[Fraction]) -> list[int]:
    """Earliest deadline first, word for word, in rational numbers."""
    jobs = []
    for source, curve in enumerate(curves(counts, bends)):
        for j in range(counts[source]):
            release = max(x for x, value in enumerate(curve) if value <= j)
            due = min(x for x, value in enumerate(curve) if value >= j + 1)
            jobs.append((release, due, source))
    ready: list[tuple[int, int]] = []
    order = []
    for slot in range(sum(counts)):
        for release, due, source in jobs:
            if release == slot:
                heappush(ready, (due, source))
        due, source = heappop(ready)
        assert slot < due
        order.append(source)
    return order


@pytest.mark.parametrize("counts", LINES)
def test_lines_are_ordered_as_by_a_heap(counts: list[int]) -> None:
    straight = [Fraction(0)] * len(counts)
    order = earliest_deadline_order(counts)
    assert order.tolist() == by_heap(counts, straight)
    for source, count in enumerate(counts):
        given = np.cumsum(order == source)
        slots = np.arange(1, len(order) + 1)
        assert np.abs(given - count * slots / len(order)).max() < 1


@pytest.mark.parametrize(
    ("counts", "steepest"),
    [([40, 60], [1, -1]), ([100, 20, 80], [3, -1, -2]), ([30, 30, 30, 30], [1, 1, -1, -1])],
)
def test_curves_are_ordered_as_by_a_heap(counts: list[int], steepest: list[int]) -> None:
    total = sum(counts)
    most = min(
        Fraction(count, abs(s) * total**2) for count, s in zip(counts, steepest, strict=True)
    )
    scale = 2**44
    for part in (1, Fraction(1, 2), Fraction(1, 3)):
        bends = [s * most * part for s in steepest]
        order = earliest_deadline_order(counts, bends)
        # bends count to 2**-44
        taken = [Fraction(b, scale) for b in largest_remainder([b * scale for b in bends], 0)]
        assert order.tolist() == by_heap(counts, taken)
        for source, curve in enumerate(curves(counts, taken)):
            given = np.cumsum(order == source).tolist()
            assert all(abs(n - value) < 1 for n, value in zip(given, curve[1:], strict=True))
    assert order.tolist() != earliest_deadline_order(counts).tolist()


@pytest.mark.parametrize("parts", [[7, 3], [70, 20, 10], [1, 1, 1], [800, 1, 199], [5, 4, 3, 2, 1]])
@pytest.mark.parametrize("owed", [0, Fraction(1, 3)])
def test_pieces_keep_to_the_targets(parts: list[int], owed: Fraction) -> None:
    shares = [Fraction(part, sum(parts)) for part in parts]
    before = [owed, -owed, *[Fraction(0)] * (len(parts) - 2)]
    total = 5_000
    targets = [b + s * total for b, s in zip(before, shares, strict=True)]
    counts = largest_remainder(targets)
    order = steady_order(counts, shares, before)
    slots = np.arange(1, total + 1)
    for source, share in enumerate(shares):
        given = np.cumsum(order == source)
        assert given[-1] == counts[source]
        assert np.abs(given - float(before[source]) - float(share) * slots).max() < 2


def test_sources_that_are_off_are_left_out() -> None:
    half = Fraction(1, 2)
    order = steady_order(
        [0, 500, 0, 500], [Fraction(0), half, Fraction(0), half], [Fraction(0)] * 4
    )
    assert order.tolist() == [1, 3] * 500
    assert earliest_deadline_order([0, 4]).tolist() == [1, 1, 1, 1]
