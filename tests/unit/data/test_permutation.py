"""A keyed permutation is a bijection with an inverse, and spreads evenly."""

import numpy as np
import pytest

from llmtrain.data.permutation import Permutation, derive_key


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 10, 99, 100, 101, 4_095, 4_096, 65_537])
def test_bijection_with_inverse(n: int) -> None:
    permutation = Permutation(n, derive_key("test", n))
    values = np.arange(n)
    places = permutation.forward(values)
    assert np.array_equal(np.sort(places), values)
    assert np.array_equal(permutation.inverse(places), values)


@pytest.mark.parametrize("n", [10**9 + 7, 10**15, 2**61 + 1])
def test_large_domains_need_no_index(n: int) -> None:
    permutation = Permutation(n, derive_key("test"))
    values = np.concatenate([np.arange(1_000), n - 1 - np.arange(1_000)])
    places = permutation.forward(values)
    assert places.min() >= 0
    assert places.max() < n
    assert np.array_equal(permutation.inverse(places), values)


def test_same_key_same_order_other_key_other_order() -> None:
    values = np.arange(10_000)
    one = Permutation(10_000, derive_key(1, "wiki", 0)).forward(values)
    assert np.array_equal(one, Permutation(10_000, derive_key(1, "wiki", 0)).forward(values))
    for other in (derive_key(2, "wiki", 0), derive_key(1, "code", 0), derive_key(1, "wiki", 1)):
        assert np.mean(one == Permutation(10_000, other).forward(values)) < 0.002


def test_keys_tell_parts_and_types_apart() -> None:
    keys = [derive_key("ab", "c"), derive_key("a", "bc"), derive_key("1"), derive_key(1)]
    assert len(set(keys)) == 4


def test_every_place_is_equally_likely() -> None:
    """Chi-square over keys of where each value goes, 4 standard deviations above its mean."""
    n, num_keys = 16, 1_000
    counts = np.zeros((n, n))
    values = np.arange(n)
    for key in range(num_keys):
        counts[values, Permutation(n, derive_key(key)).forward(values)] += 1
    expected = num_keys / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedoms = (n - 1) ** 2
    assert chi_square < freedoms + 4 * np.sqrt(2 * freedoms)


def test_neighbours_do_not_stay_neighbours() -> None:
    places = Permutation(1_000_000, derive_key("test")).forward(np.arange(50_000))
    steps = np.diff(places)
    assert np.mean(np.abs(steps) < 1_000) < 0.004
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02


def test_values_outside_are_refused() -> None:
    with pytest.raises(ValueError, match=r"outside range\(5\)"):
        Permutation(5, derive_key("test")).forward(np.array([5]))
    with pytest.raises(ValueError, match="1 <= n"):
        Permutation(0, derive_key("test"))
