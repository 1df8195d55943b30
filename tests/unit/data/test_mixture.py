"""Shares become an order of sources that never drifts and does not depend on where it is asked."""

from fractions import Fraction

import numpy as np
import pytest

from llmtrain.data.mixture import (
    SUPER_BLOCK,
    ConstantShares,
    Mixture,
    earliest_deadline_order,
    largest_remainder,
    shares_of,
)
from llmtrain.errors import ConfigError

WEIGHTS = {
    "one": {"a": 1.0},
    "thirds": {"a": 1, "b": 1, "c": 1},
    "decimal": {"a": 0.7, "b": 0.2, "c": 0.1},
    "off": {"a": 0.5, "b": 0, "c": 0.5},
    "tiny": {"a": 0.99997, "b": 0.00003},
    "many": {f"s{i:02d}": 1 / (i + 1) for i in range(30)},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_counts_stay_within_two_windows_of_the_share(name: str) -> None:
    shares = shares_of(WEIGHTS[name])
    end = SUPER_BLOCK + 20_000
    sources, ordinals = Mixture(ConstantShares(shares)).assign(0, end)
    seen = np.arange(1, end + 1)
    for i, share in enumerate(shares):
        chosen = sources == i
        assert np.abs(np.cumsum(chosen) - float(share) * seen).max() < 2
        assert np.array_equal(ordinals[chosen], np.arange(chosen.sum()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_edges_are_exact_and_never_fall(name: str) -> None:
    shares = shares_of(WEIGHTS[name])
    mixture = Mixture(ConstantShares(shares))
    for block in (0, 1, 2, 3, 10**9, 10**9 + 1):
        before, after = mixture.counts(block), mixture.counts(block + 1)
        assert sum(before) == block * SUPER_BLOCK
        assert all(one <= other for one, other in zip(before, after, strict=True))
        targets = [share * block * SUPER_BLOCK for share in shares]
        assert all(abs(c - t) < 1 for c, t in zip(before, targets, strict=True))


def test_any_piece_equals_the_whole() -> None:
    shares = shares_of(WEIGHTS["decimal"])
    low, high = SUPER_BLOCK - 300, SUPER_BLOCK + 300
    sources, ordinals = Mixture(ConstantShares(shares)).assign(low, high)
    fresh = Mixture(ConstantShares(shares))
    for start in range(low, high, 77):
        end = min(start + 77, high)
        some_sources, some_ordinals = fresh.assign(start, end)
        assert np.array_equal(some_sources, sources[start - low : end - low])
        assert np.array_equal(some_ordinals, ordinals[start - low : end - low])


def test_far_blocks_cost_the_same() -> None:
    mixture = Mixture(ConstantShares(shares_of(WEIGHTS["decimal"])))
    start = 10**12
    sources, ordinals = mixture.assign(start, start + 1_000)
    assert ordinals.min() > 0.09 * start
    assert abs(np.mean(sources == 0) - 0.7) < 0.01


def test_order_in_a_block_meets_every_deadline() -> None:
    counts = np.array([5, 0, 1, 13, 13])
    order = earliest_deadline_order(counts)
    assert np.bincount(order, minlength=5).tolist() == counts.tolist()
    slots = np.arange(1, counts.sum() + 1)
    for source, count in enumerate(counts):
        given = np.cumsum(order == source)
        assert np.abs(given - count * slots / counts.sum()).max() < 1


def test_largest_remainder_by_hand() -> None:
    targets = [Fraction(5, 2), Fraction(5, 2), Fraction(9, 4), Fraction(11, 4)]
    assert largest_remainder(targets) == [3, 2, 2, 3]


def test_floats_count_as_the_decimals_they_print_as() -> None:
    assert shares_of({"a": 0.1, "b": 0.2, "c": 0.7}) == (
        Fraction(1, 10),
        Fraction(1, 5),
        Fraction(7, 10),
    )
    assert shares_of({"a": 3, "b": 1e-3})[1] == Fraction(1, 3001)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -0.1, "b": 1.0}, "mixture.weights.a=-0.1 is no share"),
        ({"a": float("nan")}, "mixture.weights.a=nan is no share"),
        ({"a": float("inf")}, "mixture.weights.a=inf is no share"),
        ({"a": 0.0}, "are all 0"),
        ({"a": 1.0, "b": 1e-6}, "mixture.weights.b is 1e-06 of the sum, the smallest share is"),
    ],
)
def test_wrong_weights(weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shares_of(weights)
