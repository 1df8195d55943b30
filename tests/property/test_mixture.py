"""Any schedule: counts near their targets at every window, and one order wherever it is asked."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.mixture import Mixture
from llmtrain.data.phases import Phase, ShareSchedule, constant

LENGTHS = [1, 2, 3, 17, 64, 1_000, 9_999, 65_536, 131_071, 131_072, 150_000]
MOST_WINDOWS = 200_000
"""Windows a drawn schedule is followed for, beyond its phases."""


@st.composite
def schedules(draw: st.DrawFn) -> ShareSchedule:
    """Phases of all sizes, constant and linear, with sources that go on and off."""
    num_sources = draw(st.integers(1, 12))
    weight = st.one_of(st.just(0), st.integers(1, 3), st.integers(1, 5_000))
    some = st.lists(weight, min_size=num_sources, max_size=num_sources).filter(any)
    starts, start = [0], 0
    for length in draw(st.lists(st.sampled_from(LENGTHS), max_size=7)):
        start += length
        if start < MOST_WINDOWS:
            starts.append(start)
    shares = [
        tuple(Fraction(w, sum(weights)) for w in weights)
        for weights in draw(st.lists(some, min_size=len(starts), max_size=len(starts)))
    ]
    linear = draw(st.lists(st.booleans(), min_size=len(starts) - 1, max_size=len(starts) - 1))
    phases = [Phase(s, shares[k], shares[k + linear[k]]) for k, s in enumerate(starts[:-1])]
    return ShareSchedule([*phases, constant(starts[-1], shares[-1])])


def targets(schedule: ShareSchedule, start: int, end: int) -> np.ndarray:
    """Targets after start + 1, ..., end windows, [windows, sources], as floats per phase."""
    parts = []
    while start < end:
        number = schedule.phase_at(start)
        phase_end = schedule.end(number)
        stop = end if phase_end is None else min(end, phase_end)
        base = [float(t - int(t)) for t in schedule.integral(start)]
        whole = np.array([int(t) for t in schedule.integral(start)])
        x = np.arange(1, stop - start + 1, dtype=float)[:, None]
        bends = schedule.bends(number) or (Fraction(0),) * schedule.num_sources
        done = start - schedule.phase(number).start
        rates = [f + 2 * b * done for f, b in zip(schedule.phase(number).first, bends, strict=True)]
        moved = np.array(base) + x * np.array(rates, dtype=float)
        parts.append(whole + moved + x * x * np.array(bends, dtype=float))
        start = stop
    return np.concatenate(parts)


@settings(max_examples=15)
@given(schedule=schedules())
def test_counts_are_near_their_targets_at_every_window(schedule: ShareSchedule) -> None:
    mixture = Mixture(schedule)
    sources, ordinals = mixture.assign(0, MOST_WINDOWS)
    given_so_far = np.zeros((MOST_WINDOWS, schedule.num_sources))
    given_so_far[np.arange(MOST_WINDOWS), sources] = 1
    given_so_far = np.cumsum(given_so_far, axis=0)
    assert np.abs(given_so_far - targets(schedule, 0, MOST_WINDOWS)).max() < 2
    for number in range(schedule.num_phases):
        phase = schedule.phase(number)
        part = slice(phase.start, schedule.end(number))
        for source, on in enumerate(zip(phase.first, phase.last, strict=True)):
            assert any(on) or not (sources[part] == source).any()
    for source in range(schedule.num_sources):
        places = np.flatnonzero(sources == source)
        assert np.array_equal(ordinals[places], np.arange(len(places)))
        asked = np.arange(len(places) + 3)
        found = mixture.find(source, asked, MOST_WINDOWS)
        assert np.array_equal(found, [*places, *[MOST_WINDOWS] * 3])


@settings(max_examples=25)
@given(
    schedule=schedules(),
    start=st.one_of(st.integers(0, MOST_WINDOWS), st.integers(10**9, 10**9 + 10**5)),
    cuts=st.lists(st.integers(0, 5_000), max_size=6),
)
def test_any_partition_gives_the_same_order(
    schedule: ShareSchedule, start: int, cuts: list[int]
) -> None:
    end = start + 5_000
    sources, ordinals = Mixture(schedule).assign(start, end)
    fresh = Mixture(schedule)
    places = [start, *sorted(start + cut for cut in cuts), end]
    parts = [fresh.assign(a, b) for a, b in pairwise(places)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), sources)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), ordinals)
    for source in np.unique(sources).tolist():
        mine = sources == source
        found = fresh.find(source, ordinals[mine], end)
        assert np.array_equal(found, start + np.flatnonzero(mine))
        given_so_far = ordinals[mine][0] + np.cumsum(mine)
        assert np.abs(given_so_far - targets(schedule, start, end)[:, source]).max() < 2
