"""Stochastic rounding: its words, its places, and that it has no bias where plain rounding has."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.optim.rounding import (
    DRAWS_PER_WORD,
    draw,
    global_indices,
    rounded,
    rounding_key,
)
from llmtrain.parallel.region import Region

CPU = torch.device("cpu")
KEY = rounding_key(3, "model.layers.0.mlp.up_proj.weight")
MASK = (1 << 64) - 1


def split_mix(counter: int) -> int:
    """SplitMix64's output function, in Python's integers."""
    z = counter & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(st.integers(0, 2**62), st.integers(1, 2**24), st.integers(0, 2**40))
def test_words_are_those_of_the_definition(key: int, step: int, index: int) -> None:
    gamma = 0x9E3779B97F4A7C15
    want = split_mix(split_mix(key + step * gamma) + index * gamma)
    (word,) = draw(key, torch.tensor(float(step)), torch.tensor([index])).tolist()
    assert word & MASK == want


def test_the_first_words_of_split_mix_are_the_published_ones() -> None:
    """The generator with state 0 gives these (prng.di.unimi.it/splitmix64.c)."""
    gamma = 0x9E3779B97F4A7C15
    assert [split_mix(n * gamma) for n in (1, 2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@st.composite
def cuts(draw_: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw_(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    region = []
    for size in shape:
        start = draw_(st.integers(0, size - 1))
        region.append(slice(start, draw_(st.integers(start + 1, size))))
    return shape, tuple(region)


@given(cuts(), st.integers(0, 5), st.integers(0, 50))
def test_places_are_those_in_the_whole(
    cut: tuple[tuple[int, ...], Region], start: int, length: int
) -> None:
    shape, region = cut
    want = torch.arange(math.prod(shape)).view(shape)[region].reshape(-1)
    stop = min(start + length, len(want))
    found = global_indices(region, shape, start, max(start, stop), CPU)
    assert torch.equal(found, want[start : max(start, stop)])


SHARES = [0.02, 0.3, 0.5, 0.9]
SAMPLES = 1 << 16


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("share", SHARES)
def test_the_mean_of_roundings_is_the_value(share: float, sign: float) -> None:
    """The mean error of n draws has deviation sqrt(p (1 - p) / n) spacings; 4 of them are allowed.

    Plain rounding errs by min(p, 1 - p) of a spacing each time: 2,500 deviations at p = 0.5.
    """
    spacing = 2.0**-7  # of bf16 between 1 and 2
    value = torch.full((SAMPLES,), sign * (1.0 + share * spacing))
    allowed = 4 * math.sqrt(share * (1 - share) / SAMPLES) + 1e-6
    for number in range(DRAWS_PER_WORD):
        words = draw(KEY, torch.tensor(7.0), torch.arange(SAMPLES))
        found = rounded(value, words, number)
        assert set(found.abs().unique().tolist()) == {1.0, 1.0 + spacing}
        assert abs((found.double() - value).mean().item()) / spacing < allowed
    plain = (value.bfloat16().double() - value).mean().item()
    assert abs(plain) / spacing > allowed


def test_many_small_updates_move_a_weight_as_far_as_in_fp32() -> None:
    """400 updates of a tenth of half a spacing: plain rounding never moves at all."""
    exact, update, size = 1.0, 2.0**-9 / 10, 4096
    weight = torch.full((size,), exact, dtype=torch.bfloat16)
    plain = weight.clone()
    for step in range(400):
        words = draw(KEY, torch.tensor(float(step)), torch.arange(size))
        weight = rounded(weight.float() + update, words, 0)
        plain = (plain.float() + update).bfloat16()
    assert plain.unique().tolist() == [1.0]
    assert weight.double().mean().item() == pytest.approx(exact + 400 * update, abs=4e-4)


def test_draws_of_one_word_and_of_neighbours_do_not_agree() -> None:
    value = torch.full((SAMPLES,), 1.0 + 0.5 * 2.0**-7)
    words = draw(KEY, torch.tensor(7.0), torch.arange(SAMPLES))
    later = draw(KEY, torch.tensor(8.0), torch.arange(SAMPLES))
    other = draw(rounding_key(4, "a"), torch.tensor(7.0), torch.arange(SAMPLES))
    bits = [rounded(value, words, n) > 1 for n in range(DRAWS_PER_WORD)]
    bits += [rounded(value, later, 0) > 1, rounded(value, other, 0) > 1, bits[0].roll(1)]
    for i, first in enumerate(bits):
        for second in bits[:i]:
            assert abs((first == second).double().mean().item() - 0.5) < 4 * 0.5 / SAMPLES**0.5


def test_what_bf16_holds_and_what_is_no_number_stays() -> None:
    value = torch.tensor([0.0, -0.0, 1.5, -3.0e38, math.inf, -math.inf, math.nan]).bfloat16()
    words = draw(KEY, torch.tensor(1.0), torch.arange(7))
    for number in range(DRAWS_PER_WORD):
        found = rounded(value.float(), words, number)
        assert torch.equal(found.view(torch.int16), value.view(torch.int16))
