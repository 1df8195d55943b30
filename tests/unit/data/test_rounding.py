"""Targets become counts that sum exactly, never fall, and stay next to the targets."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.rounding import (
    largest_remainder,
    largest_remainder_on_lines,
    round_flow,
    round_together,
)


def test_largest_remainder_by_hand() -> None:
    targets = [Fraction(5, 2), Fraction(5, 2), Fraction(9, 4), Fraction(11, 4)]
    assert largest_remainder(targets) == [3, 2, 2, 3]
    assert largest_remainder(targets[:3], 8) == [3, 3, 2]


def test_lines_are_rounded_as_one_by_one() -> None:
    slopes = [Fraction(5, 16), Fraction(1, 4), Fraction(7, 16)]
    offsets = [Fraction(1, 2), Fraction(-1, 4), Fraction(-1, 4)]
    places = np.array([0, 1, 5, 64, 1000])
    rows = largest_remainder_on_lines(offsets, slopes, places)
    for x, row in zip(places.tolist(), rows.tolist(), strict=True):
        assert row == largest_remainder([o + s * x for o, s in zip(offsets, slopes, strict=True)])


def test_a_flow_around_a_cycle_becomes_whole() -> None:
    half = Fraction(1, 2)
    # two ways from 0 to 2 of half each, and a third of one and a half past both
    rounded = round_flow([0, 1, 0, 0], [1, 2, 2, 2], [half, half, half, Fraction(3)])
    assert rounded[0] == rounded[1] != rounded[2]
    assert rounded[3] == 3


@st.composite
def growing_targets(draw: st.DrawFn) -> list[list[Fraction]]:
    """Targets of sources that stand still or grow a little between places."""
    num_sources = draw(st.integers(1, 6))
    places = [[Fraction(0)] * num_sources]
    for _ in range(draw(st.integers(1, 8))):
        weights = draw(st.lists(st.integers(0, 4), min_size=num_sources, max_size=num_sources))
        if not any(weights):
            continue
        length = draw(st.integers(1, 5))
        places.append(
            [
                t + Fraction(w * length, sum(weights))
                for t, w in zip(places[-1], weights, strict=True)
            ]
        )
    return places


@given(targets=growing_targets())
def test_counts_rounded_together_never_fall(targets: list[list[Fraction]]) -> None:
    counts = round_together(targets, [False] * (len(targets) - 1))
    for place, row in zip(targets, counts, strict=True):
        assert sum(row) == sum(place)
        assert all(
            target // 1 <= count <= -(-target // 1)
            for target, count in zip(place, row, strict=True)
        )
    for (here, row), (there, after) in zip(
        zip(targets[:-1], counts[:-1], strict=True),
        zip(targets[1:], counts[1:], strict=True),
        strict=True,
    ):
        for a, count, b, later in zip(here, row, there, after, strict=True):
            assert later >= count
            assert later == count or b > a


@pytest.mark.parametrize("wide", [False, True])
def test_what_sources_that_are_off_owe_stays_below_a_window(wide: bool) -> None:
    # six sources of a sixth; then the first three are off, then the others
    first = [Fraction(9 * 7, 6)] * 3
    sixth = [[Fraction(7, 6)] * 6, [Fraction(7, 6)] * 3 + first, first + first]
    counts = round_together(sixth, [wide, wide])
    for off, place in ((slice(0, 3), 0), (slice(3, 6), 1)):
        assert counts[place][off] == counts[place + 1][off]
        if wide:
            owed = sum(sixth[place][off]) - sum(counts[place][off])
            assert abs(owed) < 1
