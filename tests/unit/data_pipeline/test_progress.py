"""Progress: rates and time left by cost, a line now and then where there is no terminal."""

import logging

import pytest

from data_pipeline.execute import progress as module
from data_pipeline.execute.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_tell_rates_and_the_time_left_by_cost(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Progress("02-c4 steps", num_tasks=4, cost=400_000_000, terminal=False) as progress:
        for moment, cost in ((110.0, 50_000_000), (140.0, 150_000_000), (145.0, 50_000_000)):
            clock[0] = moment
            progress.add(cost, 1_000)
        clock[0] = 200.0
        progress.add(150_000_000, 1_000)
    assert caplog.messages == [
        "02-c4 steps: 50 %, 2/4 tasks, 5.0 MB/s, 50 documents/s, 00:40 left",
    ]


def test_tasks_that_count_no_bytes_have_no_such_rate(clock: list[float]) -> None:
    with Progress("03-exact reduce", num_tasks=8, cost=8, terminal=False) as progress:
        clock[0] = 3_700.0
        progress.add(1, 0)
        assert progress.line(clock[0]) == "03-exact reduce: 12 %, 1/8 tasks, 7:00:00 left"


def test_terminal_shows_a_bar(
    clock: list[float], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Progress("00-extract extract", num_tasks=2, cost=2_000_000, terminal=True) as progress:
        clock[0] = 200.0
        progress.add(1_000_000, 40)
    shown = capsys.readouterr().err
    assert "00-extract extract" in shown
    assert "1/2 tasks, 0.0 MB/s, 0 documents/s" in shown
    assert caplog.messages == []
