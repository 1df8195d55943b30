"""Exp3: by hand, the same from a journal as lived through, and never beyond what is decided."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from llmtrain.config.mixture import (
    AdaptiveMixture,
    ConstantMixture,
    CurriculumMixture,
    MixtureConfig,
    UnimaxMixture,
)
from llmtrain.data.adaptive import AdaptiveSchedule, Exp3
from llmtrain.data.journal import SHARE_UNIT, Journal, ShareChange, from_plain
from llmtrain.data.mixture import Mixture
from llmtrain.data.shares import share_schedule
from llmtrain.errors import DataError

RULE = Exp3(interval=500, learning_rate=0.5, exploration=0.2, loss_scale=10.0)
HALVES = [Fraction(1, 2), Fraction(1, 2)]
LOSSES = [(300.0, 100.0), (800.0, 100.0)]


def schedule() -> AdaptiveSchedule:
    return AdaptiveSchedule(RULE, HALVES)


def test_a_decision_by_hand() -> None:
    change = schedule().decide(LOSSES)
    weights = [math.exp(0.5 * 0.3), math.exp(0.5 * 0.8)]
    expected = [0.8 * w / sum(weights) + 0.1 for w in weights]
    assert change.first_unit == 1_000
    assert [part / SHARE_UNIT for part in change.shares] == pytest.approx(expected, abs=1e-5)
    assert change.state == pytest.approx((-0.25, 0.0), abs=1e-9)


def test_first_shares_are_the_weights_and_exploration() -> None:
    first = RULE.first([Fraction(3, 4), Fraction(1, 4)])
    assert [part / SHARE_UNIT for part in first.shares] == pytest.approx([0.7, 0.3], abs=1e-5)


def test_losses_that_say_nothing_leave_weights_alone() -> None:
    first = RULE.first(HALVES)
    for losses in ([(0.0, 0.0)] * 2, [(math.nan, 5.0), (math.inf, 5.0)], [(3.0, 1.0)] * 2):
        assert RULE.next(first, losses, 1_000, [Fraction(500)] * 2).shares == first.shares
    capped = RULE.next(first, [(1e9, 1.0), (20.0, 1.0)], 1_000, [Fraction(500)] * 2)
    assert capped.shares == first.shares


def test_shares_add_up_and_every_source_goes_on() -> None:
    lived = schedule()
    for _ in range(200):
        change = lived.decide([(0.0, 10.0), (99.0, 10.0)])
        assert sum(change.shares) == SHARE_UNIT
    assert [part / SHARE_UNIT for part in change.shares] == pytest.approx([0.1, 0.9], abs=1e-4)


def test_a_journal_gives_the_same_stream() -> None:
    rng = np.random.default_rng(3)
    lived = schedule()
    mixture = Mixture(lived)
    journal = Journal()
    streams = []
    for k in range(12):
        assert mixture.known_units == (k + 2) * 500
        assert lived.decides_after == (k + 1) * 500
        streams.append(mixture.assign(k * 500, (k + 1) * 500 + 250))
        losses = [(float(loss), 100.0) for loss in rng.uniform(100, 1_000, 2)]
        journal = replace(journal, shares=(*journal.shares, lived.decide(losses)))
        read = Mixture(AdaptiveSchedule(RULE, HALVES, from_plain(journal.to_plain()).shares))
        for start in (0, k * 500 + 7):
            for one, other in zip(
                read.assign(start, (k + 3) * 500), mixture.assign(start, (k + 3) * 500), strict=True
            ):
                assert np.array_equal(one, other)
    whole = mixture.assign(0, 14 * 500)
    for k, stream in enumerate(streams):  # what was read before a decision stays as it was
        for one, other in zip(stream, whole, strict=True):
            assert np.array_equal(one, other[k * 500 : (k + 1) * 500 + 250])
    for source in (0, 1):
        places = np.flatnonzero(whole[0] == source)
        assert np.array_equal(mixture.find(source, np.arange(len(places)), 7_000), places)
        seen = np.cumsum(whole[0] == source)
        targets = [float(lived.integral(x)[source]) for x in range(1, 7_001)]
        assert np.abs(seen - targets).max() < 2


def test_a_decision_can_be_made_again_from_the_last_one() -> None:
    lived = schedule()
    changes = [lived.decide(LOSSES) for _ in range(4)]
    again = AdaptiveSchedule(RULE, HALVES, changes[:3])
    assert again.decide(LOSSES) == changes[3]


def test_going_back_takes_other_decisions() -> None:
    lived = schedule()
    mixture = Mixture(lived)
    first = lived.decide(LOSSES)
    lived.decide(LOSSES)
    before = mixture.assign(1_500, 2_000)[0]
    lived.follow([first])
    assert mixture.known_units == 1_500
    with pytest.raises(IndexError, match="has decided on 1500"):
        mixture.assign(1_500, 2_000)
    lived.decide([(5_000.0, 1.0), (0.0, 1.0)])
    after = mixture.assign(1_500, 2_000)[0]
    assert (after == 0).sum() > (before == 0).sum()


def test_windows_that_are_not_decided_are_not_given() -> None:
    mixture = Mixture(schedule())
    mixture.assign(0, 1_000)
    with pytest.raises(IndexError, match="windows up to 1001 were asked for"):
        mixture.assign(999, 1_001)
    assert mixture.find(0, np.array([10**6]), 10**7).tolist() == [1_000]


@pytest.mark.parametrize(
    "change",
    [
        ShareChange(1_500, (32_768, 32_768), (0.0, 0.0)),
        ShareChange(1_000, (32_768, 32_767), (0.0, 0.0)),
        ShareChange(1_000, (65_536,), (0.0,)),
        ShareChange(1_000, (32_768, 32_768)),
        ShareChange(1_000, (65_535, 1), (0.0, 0.0)),
    ],
)
def test_a_journal_of_another_run_is_refused(change: ShareChange) -> None:
    with pytest.raises(DataError, match="the journal holds shares of"):
        AdaptiveSchedule(RULE, HALVES, [change])


def test_a_cap_holds_whatever_the_losses_are() -> None:
    config = AdaptiveMixture(
        interval_tokens=1_000, learning_rate=1.0, exploration=0.3, max_epochs=2.0
    )
    windows = {"a": 1_000, "b": 4_000, "c": 9_000}
    lived = share_schedule(config, windows, unit_tokens=1, num_tokens=20_000)
    assert isinstance(lived, AdaptiveSchedule)
    while lived.known_units < 20_000:
        lived.decide([(100.0, 10.0), (50.0, 10.0), (1.0, 10.0)])
    given = lived.integral(20_000)
    assert all(g <= 2 * size for g, size in zip(given, windows.values(), strict=True))
    assert given[0] > 1_800
    lived.decide([(100.0, 10.0), (50.0, 10.0), (1.0, 10.0)])  # beyond the run there is no cap


def test_fingerprint_is_of_the_rule_not_of_what_it_decided() -> None:
    lived = schedule()
    before = lived.fingerprint
    lived.decide(LOSSES)
    assert lived.fingerprint == before
    other = AdaptiveSchedule(replace(RULE, learning_rate=0.4), HALVES)
    assert other.fingerprint != before


def test_a_longer_run_has_another_fingerprint_only_where_shares_hang_on_its_length() -> None:
    def fingerprint(config: MixtureConfig, num_tokens: int) -> str:
        windows = {"a": 100, "b": 900}
        return share_schedule(config, windows, unit_tokens=1, num_tokens=num_tokens).fingerprint

    free = AdaptiveMixture(interval_tokens=500)
    fixed: list[MixtureConfig] = [ConstantMixture(), UnimaxMixture(), free]
    for config in fixed:
        assert fingerprint(config, 100) == fingerprint(config, 200)
    planned: list[MixtureConfig] = [
        replace(free, max_epochs=9.0), CurriculumMixture(order=("a", "b")),
    ]  # fmt: skip
    for config in planned:
        before, after = fingerprint(config, 1_000), fingerprint(config, 2_000)
        assert before != after
        assert after.startswith("planned for the 2,000 windows of training.num_tokens, ")
    assert fingerprint(UnimaxMixture(max_epochs=2.0), 1_500).startswith("planned for the 1,500 ")
