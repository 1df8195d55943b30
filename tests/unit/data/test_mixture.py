"""Shares become an order of sources that never drifts and does not depend on where it is asked."""

import time
from fractions import Fraction

import numpy as np
import pytest

from llmtrain.data.mixture import SUPER_BLOCK, Mixture
from llmtrain.data.phases import Phase, ShareSchedule, constant
from llmtrain.data.shares import shares_of

WEIGHTS = {
    "one": {"a": 1.0},
    "thirds": {"a": 1, "b": 1, "c": 1},
    "decimal": {"a": 0.7, "b": 0.2, "c": 0.1},
    "off": {"a": 0.5, "b": 0, "c": 0.5},
    "tiny": {"a": 0.99997, "b": 0.00003},
    "many": {f"s{i:02d}": 1 / (i + 1) for i in range(30)},
}


def constant_mixture(name: str) -> Mixture:
    return Mixture(ShareSchedule([constant(0, shares_of(WEIGHTS[name]))]))


def phased() -> Mixture:
    """A step, a long line on which a source comes from nothing, and a phase without another."""
    a, b, c = (shares_of(w) for w in ({0: 3, 1: 1, 2: 0}, {0: 1, 1: 3, 2: 2}, {0: 0, 1: 1, 2: 5}))
    return Mixture(
        ShareSchedule(
            [constant(0, a), Phase(777, a, b), constant(200_000, b), constant(250_001, c)]
        )
    )


@pytest.mark.parametrize("name", WEIGHTS)
def test_counts_stay_within_two_windows_of_the_share(name: str) -> None:
    end = SUPER_BLOCK + 20_000
    sources, ordinals = constant_mixture(name).assign(0, end)
    seen = np.arange(1, end + 1)
    for i, share in enumerate(shares_of(WEIGHTS[name])):
        chosen = sources == i
        assert np.abs(np.cumsum(chosen) - float(share) * seen).max() < 2
        assert np.array_equal(ordinals[chosen], np.arange(chosen.sum()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_edges_are_exact_and_never_fall(name: str) -> None:
    shares = shares_of(WEIGHTS[name])
    mixture = constant_mixture(name)
    for block in (0, 1, 2, 3, 10**9, 10**9 + 1):
        edge = block * SUPER_BLOCK
        before, after = mixture.counts(edge), mixture.counts(edge + SUPER_BLOCK)
        assert sum(before) == edge
        assert all(one <= other for one, other in zip(before, after, strict=True))
        assert all(abs(c - share * edge) < 1 for c, share in zip(before, shares, strict=True))


def test_blocks_end_with_their_phase() -> None:
    mixture = phased()
    assert mixture.edges(776) == (0, 777)
    assert mixture.edges(777) == (777, 777 + SUPER_BLOCK)
    last = 777 + 2 * SUPER_BLOCK
    assert mixture.edges(last) == mixture.edges(199_999) == (last, 200_000)
    assert mixture.edges(230_000) == (200_000, 250_001)
    assert mixture.edges(250_001 + SUPER_BLOCK)[0] == 250_001 + SUPER_BLOCK


def test_any_piece_equals_the_whole() -> None:
    whole, fresh = phased(), phased()
    for edge in (777, 777 + SUPER_BLOCK, 200_000, 250_001):
        low, high = edge - 300, edge + 300
        sources, ordinals = whole.assign(low, high)
        for start in range(low, high, 77):
            end = min(start + 77, high)
            some_sources, some_ordinals = fresh.assign(start, end)
            assert np.array_equal(some_sources, sources[start - low : end - low])
            assert np.array_equal(some_ordinals, ordinals[start - low : end - low])
    assert len(whole.assign(5, 5)[0]) == 0


def test_a_source_that_is_off_gives_nothing() -> None:
    mixture = phased()
    sources, _ = mixture.assign(0, 300_000)
    assert not (sources[:777] == 2).any()
    assert not (sources[250_001:] == 0).any()
    assert (sources[777:250_001] == 2).any()


def test_a_line_is_followed_inside_a_block() -> None:
    ends = shares_of({0: 1, 1: 0}), shares_of({0: 0, 1: 1})
    length = 2 * SUPER_BLOCK - 1  # one block
    mixture = Mixture(ShareSchedule([Phase(0, *ends), constant(length, ends[1])]))
    x = np.arange(1, length + 1, dtype=float)
    given = np.cumsum(mixture.assign(0, length)[0] == 1)
    assert np.abs(given - x * x / (2 * length)).max() < 2


def test_far_windows_cost_the_same() -> None:
    times = []
    for start in (10**5, 10**9, 10**12):
        mixture = constant_mixture("decimal")
        begun = time.process_time()
        sources, ordinals = mixture.assign(start, start + 1_000)
        found = mixture.find(0, ordinals[sources == 0], start + 1_000)
        times.append(time.process_time() - begun)
        assert np.array_equal(found, start + np.flatnonzero(sources == 0))
        assert abs(ordinals[sources == 0][0] - 0.7 * start) < 2
    assert max(times) < 0.5


def test_the_way_back_from_a_window() -> None:
    mixture = phased()
    end = 280_000
    sources, ordinals = mixture.assign(0, end)
    rng = np.random.default_rng(0)
    for source in range(3):
        places = np.flatnonzero(sources == source)
        some = rng.choice(places, 200)
        assert np.array_equal(mixture.find(source, ordinals[some], end), some)
        beyond = np.array([len(places), 10**9])
        assert mixture.find(source, beyond, end).tolist() == [end, end]
    assert mixture.find(0, np.array([0, 700]), 10).tolist() == [0, 10]
    assert mixture.find(0, np.zeros(0, dtype=np.int64), end).tolist() == []


def test_a_source_off_for_ever_is_searched_in_no_time() -> None:
    mixture = phased()
    given = int((mixture.assign(0, 250_001)[0] == 0).sum())
    assert mixture.find(0, np.array([given - 1, given]), 10**15)[1] == 10**15


def test_half_of_a_window_owed_by_many_sources() -> None:
    # at 7 windows every source owes a part; half of them never come back
    even, half = shares_of(dict.fromkeys(range(10), 1)), shares_of({i: i % 2 for i in range(10)})
    mixture = Mixture(ShareSchedule([constant(0, even), constant(7, half)]))
    sources, _ = mixture.assign(0, 3 * SUPER_BLOCK)
    x = np.arange(1, len(sources) + 1)
    for i in range(10):
        target = np.minimum(x, 7) / 10 + np.maximum(x - 7, 0) * float(Fraction(half[i]))
        assert np.abs(np.cumsum(sources == i) - target).max() < 2
