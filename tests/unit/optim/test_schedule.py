"""The learning rate at every edge of every phase."""

import pytest

from llmtrain.config.training import OptimizerConfig, ScheduleConfig
from llmtrain.optim.schedule import CURVES, learning_rate

PEAK = OptimizerConfig(lr=2.0)


def test_warm_up_rises_linearly_and_meets_the_curve() -> None:
    for kind in CURVES:
        lr = learning_rate(PEAK, ScheduleConfig(kind=kind, warmup_tokens=100), 1000)
        assert lr(1) == pytest.approx(0.02)
        assert lr(50) == pytest.approx(1.0)
        assert lr(100) == 2.0


def test_without_warm_up_the_first_step_is_already_near_the_peak() -> None:
    assert learning_rate(PEAK, ScheduleConfig(kind="linear", final_lr_ratio=0.0), 1000)(
        1
    ) == pytest.approx(1.998)


@pytest.mark.parametrize(("kind", "half"), [("cosine", 1.1), ("linear", 1.1), ("constant", 2.0)])
def test_the_curve_falls_to_the_floor_and_stays_there(kind: str, half: float) -> None:
    lr = learning_rate(PEAK, ScheduleConfig(kind=kind, warmup_tokens=100), 1100)  # type: ignore[arg-type]
    assert lr(600) == pytest.approx(half)
    floor = 2.0 if kind == "constant" else 0.2
    assert lr(1100) == pytest.approx(floor)
    assert lr(5000) == pytest.approx(floor)


def test_cosine_is_flat_at_both_ends() -> None:
    lr = learning_rate(PEAK, ScheduleConfig(kind="cosine", final_lr_ratio=0.0), 1000)
    assert 2.0 - lr(10) < 0.001
    assert lr(990) < 0.001


def test_wsd_holds_the_peak_and_falls_at_the_end() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_tokens=100, decay_tokens=200, final_lr_ratio=0.0)
    lr = learning_rate(PEAK, schedule, 1000)
    assert lr(100) == lr(500) == lr(800) == 2.0
    assert lr(900) == pytest.approx(1.0)
    assert lr(1000) == 0.0


def test_wsd_decays_over_a_tenth_of_the_run_by_default() -> None:
    lr = learning_rate(PEAK, ScheduleConfig(kind="wsd"), 1000)
    assert lr(900) == 2.0
    assert lr(901) < 2.0


def test_a_longer_run_keeps_the_stable_phase_of_a_shorter_one() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_tokens=10, decay_tokens=100)
    short, long = learning_rate(PEAK, schedule, 1000), learning_rate(PEAK, schedule, 2000)
    assert [short(t) for t in range(1, 901, 7)] == [long(t) for t in range(1, 901, 7)]


def test_the_rate_depends_on_tokens_not_on_the_batch() -> None:
    lr = learning_rate(PEAK, ScheduleConfig(warmup_tokens=300), 10_000)
    assert [lr(64 * step) for step in (2, 4, 6)] == [lr(128 * step) for step in (1, 2, 3)]
