"""Every kind of mixture gives the shares it says, or one clear sentence why it cannot."""

from fractions import Fraction

import pytest

from llmtrain.config.mixture import (
    AdaptiveMixture,
    ConstantMixture,
    CurriculumMixture,
    MixtureConfig,
    MixturePhase,
    PhasesMixture,
    TemperatureMixture,
    UnimaxMixture,
)
from llmtrain.config.strict import build
from llmtrain.data.mixture import Mixture
from llmtrain.data.phases import ShareSchedule
from llmtrain.data.shares import by_temperature, share_schedule, shares_of, unimax
from llmtrain.errors import ConfigError

WINDOWS = {"wiki": 3_000, "code": 1_000, "books": 6_000}
UNIT = 100


def plan(config: MixtureConfig, num_tokens: int = 1_000_000) -> ShareSchedule:
    return share_schedule(config, WINDOWS, unit_tokens=UNIT, num_tokens=num_tokens)


def shares_at(schedule: ShareSchedule, window: int, length: int = 1) -> list[float]:
    """Mean shares over some windows, in order of names: books, code, wiki."""
    pair = zip(schedule.integral(window), schedule.integral(window + length), strict=True)
    return [float((after - before) / length) for before, after in pair]


def test_constant_shares_are_given_or_by_windows() -> None:
    assert shares_at(plan(ConstantMixture()), 7) == [0.6, 0.1, 0.3]
    given = ConstantMixture(weights={"wiki": 0.25, "code": 0.25, "books": 0.5})
    assert shares_at(plan(given), 10**9) == [0.5, 0.25, 0.25]
    ratio = ConstantMixture(weights={"wiki": 1, "code": 1, "books": 2})
    assert plan(ratio).fingerprint == plan(given).fingerprint == "0: 1/2 1/4 1/4"


def test_temperature_flattens() -> None:
    weights = by_temperature({"a": 1_000_000, "b": 10_000}, 2.0)
    assert weights == {"a": 1, "b": Fraction(1, 10)}
    assert by_temperature({"a": 8, "b": 4}, 3.0)["b"] == Fraction(793_700_526, 10**9)
    linear = shares_at(plan(TemperatureMixture(temperature=1.0)), 0)
    assert linear == pytest.approx([0.6, 0.1, 0.3], abs=1e-9)
    flat = shares_at(plan(TemperatureMixture(temperature=1e6)), 0)
    assert max(flat) - min(flat) < 1e-5


def test_unimax_shares_out_what_small_sources_cannot_give() -> None:
    gives = unimax({"a": 10, "b": 100, "c": 1_000}, Fraction(2), 600)
    assert gives == {"a": 20, "b": 200, "c": 380}
    assert unimax({"a": 10, "b": 100}, Fraction(30), 600) == {"a": 300, "b": 300}
    schedule = plan(UnimaxMixture(max_epochs=2), 1_500_000)
    assert schedule.integral(15_000) == [7_000, 2_000, 6_000]


def test_unimax_refuses_more_than_there_is() -> None:
    with pytest.raises(ConfigError, match=r"takes 30,000 windows, .* give 20,000; .* least 3.0"):
        plan(UnimaxMixture(max_epochs=2), 3_000_000)


def phase(until_tokens: int | None, interpolation: str = "step", **weights: float) -> MixturePhase:
    return build(
        MixturePhase,
        {"until_tokens": until_tokens, "weights": weights, "interpolation": interpolation},
    )


def test_phases_step_and_slide() -> None:
    schedule = plan(
        PhasesMixture(
            phases=(
                phase(10_050, wiki=1),
                phase(200_000, "linear", wiki=1),
                phase(None, books=0.5, code=0.5),
            )
        )
    )
    assert schedule.integral(101) == [0, 0, 101]  # 10,050 tokens end inside window 100
    assert shares_at(schedule, 101, 1_899) == [0.25, 0.25, 0.5]
    assert shares_at(schedule, 101 + 949, 1) == pytest.approx([0.25, 0.25, 0.5], abs=1e-3)
    assert shares_at(schedule, 2_000, 10**6) == [0.5, 0.5, 0]


def test_a_phase_shorter_than_a_window_is_refused() -> None:
    short = PhasesMixture(phases=(phase(110, wiki=1), phase(190, code=1), phase(None, books=1)))
    with pytest.raises(ConfigError, match=r"phases\[1\] ends at 190 tokens, less than a window"):
        plan(short)


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.7, 1.0])
def test_a_curriculum_uses_each_source_in_proportion(overlap: float) -> None:
    config = CurriculumMixture(order=("code", "books", "wiki"), overlap=overlap, max_epochs=1.0)
    schedule = plan(config)
    assert schedule.integral(10_000) == [6_000, 1_000, 3_000]
    assert shares_at(schedule, 10_000, 100) == [0.6, 0.1, 0.3]
    centres = []
    for i in range(3):
        steps = [shares_at(schedule, x, 100)[i] for x in range(0, 10_000, 100)]
        centres.append(sum(k * s for k, s in enumerate(steps)) / sum(steps))
    assert centres[1] < centres[0] < centres[2]
    early = shares_at(schedule, 0)
    assert early[1] == pytest.approx({0.0: 1, 0.1: 1, 0.25: 0.8}.get(overlap, early[1]), abs=0.01)
    counts = Mixture(schedule).assign(0, 10_000)[0]
    assert [int((counts == i).sum()) for i in range(3)] == [6_000, 1_000, 3_000]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ConstantMixture(max_epochs=1), None),
        (
            ConstantMixture(weights={"wiki": 1, "code": 1, "books": 2}, max_epochs=1),
            r"source code is read 2.5 times in 1,000,000 tokens, .*epochs=1; .* least 2.5",
        ),
        (TemperatureMixture(temperature=5, max_epochs=1.5), "source code is read"),
        (
            PhasesMixture(
                phases=(phase(500_000, code=1), phase(None, books=1, wiki=1)), max_epochs=4
            ),
            "source code is read 5 times",
        ),
    ],
)
def test_plans_beyond_the_cap_are_refused(config: MixtureConfig, message: str | None) -> None:
    if message is None:
        plan(config)
        return
    with pytest.raises(ConfigError, match=message):
        plan(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaptiveMixture(interval_tokens=1_000), r"use an interval of at least \d+ tokens"),
        (AdaptiveMixture(interval_tokens=100_000, max_epochs=0.5), "give 5,000; train on fewer"),
    ],
)
def test_adaptive_mixtures_that_cannot_be(config: MixtureConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config)


def test_the_smallest_interval_that_a_message_names_is_enough() -> None:
    with pytest.raises(ConfigError) as error:
        plan(AdaptiveMixture(interval_tokens=100, exploration=0.01))
    least = int(str(error.value).split("at least ")[1].split()[0])
    plan(AdaptiveMixture(interval_tokens=least, exploration=0.01))
    with pytest.raises(ConfigError):
        plan(AdaptiveMixture(interval_tokens=least - UNIT, exploration=0.01))


def test_floats_count_as_the_decimals_they_print_as() -> None:
    assert shares_of({"a": 0.1, "b": 0.2, "c": 0.7}) == (
        Fraction(1, 10),
        Fraction(1, 5),
        Fraction(7, 10),
    )
    assert shares_of({"a": 3, "b": 1e-3})[1] == Fraction(1, 3001)


def test_a_share_below_a_window_of_a_block_is_refused() -> None:
    message = "mixture.weights.b is 1e-06 of the sum, the smallest share is"
    with pytest.raises(ConfigError, match=message):
        shares_of({"a": 1.0, "b": 1e-6})


def test_a_long_plan_has_a_short_fingerprint() -> None:
    order = ("code", "books", "wiki")
    prints = {plan(CurriculumMixture(order=order, overlap=o)).fingerprint for o in (0.1, 0.2, 0.3)}
    assert len(prints) == 3
    assert all(len(p) <= 500 for p in prints)


def test_a_mixture_of_other_sources_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mixture\.order gives no share to the source wiki"):
        plan(CurriculumMixture(order=("code", "books")))
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        share_schedule(ConstantMixture(), {}, unit_tokens=1, num_tokens=1)


def test_a_source_too_small_for_a_share_is_named() -> None:
    sizes = {"wiki": 10**6, "code": 1}
    with pytest.raises(ConfigError, match="the size of source code is 1e-06 of the sum, the small"):
        share_schedule(ConstantMixture(), sizes, unit_tokens=1, num_tokens=100)
    small = PhasesMixture(phases=(phase(None, wiki=0.999999, code=0.000001),))
    with pytest.raises(
        ConfigError, match=r"mixture\.phases\[0\]\.weights\.code is 1e-06 of the sum"
    ):
        share_schedule(small, sizes, unit_tokens=1, num_tokens=100)
