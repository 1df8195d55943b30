"""A run stops while there is time for its last save."""

import pytest

from llmtrain.train.time_limit import TimeLimit


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def steps_until_the_end(limit: TimeLimit, clock: Clock, step_s: float) -> int:
    done = 0
    while not limit.reached() and done < 1000:
        clock.now += step_s
        done += 1
    return done


@pytest.mark.parametrize(
    ("max_time_s", "job_end", "save_s", "expected"),
    [
        (100.0, None, 4.0, 47),  # 94 + 6 for the save
        (100.0, None, None, 40),  # as long as the grace time
        (None, 1050.0, 4.0, 22),
        (100.0, 1050.0, 4.0, 22),
        (40.0, 1050.0, 4.0, 17),
        (1.0, None, 4.0, 1),  # never none at all
    ],
)
def test_the_last_step_leaves_time_for_a_save(
    max_time_s: float | None, job_end: float | None, save_s: float | None, expected: int
) -> None:
    clock = Clock()
    limit = TimeLimit(max_time_s, job_end, grace_s=20.0, save_s=lambda: save_s, clock=clock)
    assert steps_until_the_end(limit, clock, 2.0) == expected
    name = "training.max_time_s" if max_time_s not in (None, 100.0) else limit.why.split()[0]
    assert limit.why.startswith(f"{name} leaves ")
    assert limit.reached()


def test_a_pause_is_no_step_and_needs_no_time_left_for_it() -> None:
    clock = Clock()
    limit = TimeLimit(100.0, None, grace_s=20.0, save_s=lambda: 4.0, clock=clock)
    asked = []
    for _ in range(3):
        assert not limit.reached()
        clock.now += 2.0
        with limit.paused():
            for _ in range(11):
                asked.append(limit.reached())
                clock.now += 3.0
    assert asked == [False] * 30 + [True] * 3  # 94 of 100 seconds are gone, a save may take 6
    assert limit.why == (
        "training.max_time_s leaves 4.0 s, less than 6.0 s for a save: saved and stopped"
    )


def test_a_step_after_a_pause_is_as_long_as_one_before() -> None:
    clock = Clock()
    limit = TimeLimit(100.0, None, grace_s=20.0, save_s=lambda: 4.0, clock=clock)
    limit.reached()
    clock.now += 2.0
    with limit.paused():
        clock.now += 50.0
    assert steps_until_the_end(limit, clock, 2.0) == 21


def test_without_a_limit_the_run_goes_on() -> None:
    clock = Clock()
    limit = TimeLimit(None, None, grace_s=20.0, save_s=lambda: 4.0, clock=clock)
    assert steps_until_the_end(limit, clock, 5.0) == 1000
    assert not limit.why


def test_a_slow_save_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    clock, saves = Clock(), iter([None, None, 10.0, 29.0, 31.0, *[50.0] * 996])
    limit = TimeLimit(None, None, grace_s=30.0, save_s=lambda: next(saves), clock=clock)
    for _ in range(20):
        limit.reached()
        clock.now += 0.5
    [warning] = caplog.messages
    assert "a step of up to 0.5 s and a save of 31.0 s are more than checkpoint.grace_s=30" in (
        warning
    )
