"""RUN/events.jsonl: what is written, by whom, over several starts; hangs; spikes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.ramp import StepSchedule
from llmtrain.engine.protocol import StepResult
from llmtrain.train.events import Events, read_events
from llmtrain.train.progress import Progress
from llmtrain.train.rundir import ExitReason
from llmtrain.train.spikes import FEWEST_ROWS, Spikes
from llmtrain.train.stalls import TimedSaves
from llmtrain.train.watchdog import Watchdog

RESULT: Any = StepResult(
    loss_sum=torch.ones(()), target_tokens=torch.ones(()), grad_norm=torch.ones(()),
    applied=torch.tensor(True), metrics={},
)  # fmt: skip


def progress(step: int = 0) -> Progress:
    return Progress(num_steps=100, steps=StepSchedule(8, 8), step=step)


def events_of(path: Path, step: int = 0, rank: int = 0) -> Events:
    return Events(path, rank=rank, device=torch.device("cpu"), progress=progress(step))


def kinds(path: Path) -> list[tuple[int, str, int]]:
    return [(event["attempt"], event["kind"], event["step"]) for event in read_events(path)]


def test_every_start_of_a_run_is_an_attempt(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with events_of(path) as first:
        first.began()
    with events_of(path) as second:  # killed before a checkpoint
        second.began()
    with events_of(path, step=20) as third:
        third.began()
        third.ended(ExitReason.PREEMPTED)
    assert kinds(path) == [(1, "start", 0), (2, "start", 0), (3, "resumed", 20),
                           (3, "preempted", 20)]  # fmt: skip
    assert "no checkpoint yet" in read_events(path)[1]["text"]
    assert set(read_events(path)[0]) == {"time", "step", "attempt", "kind", "text"}


@pytest.mark.parametrize("reason", [
    ExitReason.DONE, ExitReason.STOP_AT_STEP, ExitReason.PREEMPTED, ExitReason.SAVE_FAILED,
    ExitReason.DIVERGED, ExitReason.PEER_LOST,
])  # fmt: skip
def test_every_end_of_the_loop_is_an_event(tmp_path: Path, reason: ExitReason) -> None:
    events_of(tmp_path / "events.jsonl").ended(reason)
    (event,) = read_events(tmp_path / "events.jsonl")
    expected = {"done": "done", "stop_at_step": "done", "preempted": "preempted"}
    assert event["kind"] == expected.get(reason.value, "failed")


def test_a_line_cut_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events_of(path).began()
    with path.open("a") as file:
        file.write('{"time": 1.0, "st')
    events_of(path, step=3).began()
    assert kinds(path) == [(1, "start", 0), (2, "resumed", 3)]
    assert len(path.read_text().splitlines()) == 3


def test_what_escapes_is_an_event_before_the_sinks_close(tmp_path: Path) -> None:
    path, heard = tmp_path / "events.jsonl", list[tuple[str, str]]()
    events = events_of(path, step=7)
    events.listeners.append(lambda kind, text: heard.append((kind, text)))
    with pytest.raises(ZeroDivisionError), events:
        _ = 1 / 0
    assert heard == [("failed", "ZeroDivisionError: division by zero")]
    assert kinds(path) == [(1, "failed", 7)]


def test_any_rank_says_that_its_memory_ran_out_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events_of(path).began()
    events = events_of(path, step=4, rank=3)
    events.began()
    events.ended(ExitReason.DONE)
    with pytest.raises(torch.OutOfMemoryError), events:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert kinds(path) == [(1, "start", 0), (1, "out_of_memory", 4)]
    assert read_events(path)[1]["text"].startswith("rank 3: asked for 2.00 GiB")


def test_a_full_disk_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    events = events_of(path)
    path.mkdir()
    events.began()
    assert "could not be written" in caplog.text


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_hang_is_said_once_until_a_step_ends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Watchdog(0.05, events_of(path)) as watchdog:
        until(lambda: read_events(path))
        time.sleep(0.1)
        assert [kind for _, kind, _ in kinds(path)] == ["hang"]
        watchdog.after_step(progress(1), RESULT)
        until(lambda: len(read_events(path)) == 2)
    count = len(read_events(path))
    time.sleep(0.1)
    assert len(read_events(path)) == count
    assert "no step ended for 0 s" in read_events(path)[0]["text"]


def test_steps_that_end_in_time_are_no_hang(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Watchdog(20.0, events_of(path)) as watchdog:
        for step in range(5):
            watchdog.after_step(progress(step), RESULT)
    assert read_events(path) == []


def row(step: int, loss: float | None, grad_norm: float = 1.0, skipped: int = 0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "skipped_steps": skipped}


def falling(step: int) -> float:
    return 4.0 - 0.01 * step + 0.02 * (-1) ** step


def test_a_spike_is_one_event_however_long_it_lasts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    spikes = Spikes(events_of(path), zscore=6.0)
    for step in range(40):
        spikes.write(row(step, falling(step)))
    assert read_events(path) == []
    for step in (40, 41, 42):
        spikes.write(row(step, 9.0))
    for step in (43, 44):
        spikes.write(row(step, falling(step)))
    spikes.write(row(45, falling(45), grad_norm=30.0))
    texts = [event["text"] for event in read_events(path)]
    assert len(texts) == 2
    assert texts[0].startswith("loss 9 is ")
    assert "deviations above the median of the last 40 rows, 3.8" in texts[0]
    assert texts[1].startswith("gradient norm 30 is ")


def test_a_resumed_run_knows_its_rows_and_a_new_one_waits_for_some(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    rows = [row(step, falling(step)) for step in range(FEWEST_ROWS)]
    Spikes(events_of(path), 6.0, rows[:-1]).write(row(50, 90.0))
    Spikes(events_of(path), None, rows).write(row(50, 90.0))
    assert read_events(path) == []
    Spikes(events_of(path), 6.0, rows).write(row(50, 90.0))
    assert [event["kind"] for event in read_events(path)] == ["spike"]


def test_skipped_updates_are_events_also_where_nothing_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    Spikes(events_of(path), 6.0).write(row(50, None, skipped=2))
    (event,) = read_events(path)
    assert event["kind"] == "skipped_step"
    assert event["text"].startswith("2 updates")


class Saver:
    def __init__(self, *outcomes: bool) -> None:
        self.outcomes = list(outcomes)
        self.stalled_s = 0.0

    def due(self, progress: Progress) -> bool:
        return progress.step == 5

    def save(self, progress: Progress) -> bool:
        self.stalled_s += 0.25
        return self.outcomes.pop(0)

    def wait(self) -> bool:
        return self.outcomes.pop(0)


def test_saves_are_timed_and_failures_are_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    saves = TimedSaves(Saver(True, False, False, True, False), events_of(path))
    assert [saves.due(progress(step)) for step in (4, 5)] == [False, True]
    found = [saves.save(progress(5)) for _ in range(3)]
    assert (found, len(read_events(path))) == ([True, False, False], 1)
    assert saves.fields() == {"checkpoint_s": 0.75}
    assert saves.fields() == {"checkpoint_s": 0.0}
    assert [saves.wait(), saves.wait()] == [True, False]
    assert [event["kind"] for event in read_events(path)] == ["save_failed"] * 2
    assert json.loads(path.read_text().splitlines()[0])["step"] == 0
