"""RUN/events.jsonl: what is written, by whom, over several starts; hangs; spikes."""

import json
from pathlib import Path

import pytest
import torch

from llmtrain import json_lines
from llmtrain.config.ramp import StepSchedule
from llmtrain.hang.heartbeat import Heartbeat
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train.events import Events
from llmtrain.train.stalls import TimedSaves


def progress(step: int = 0) -> Progress:
    return Progress(num_steps=100, steps=StepSchedule(8, 8), step=step)


def events_of(path: Path, step: int = 0, rank: int = 0) -> Events:
    return Events(path, rank=rank, device=torch.device("cpu"), progress=progress(step))


def kinds(path: Path) -> list[tuple[int, str, int]]:
    return [(event["attempt"], event["kind"], event["step"]) for event in json_lines.read(path)]


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
    assert json_lines.read(path)[1]["text"] == "starts over at step 0"
    assert set(json_lines.read(path)[0]) == {"time", "step", "attempt", "kind", "text"}


@pytest.mark.parametrize("reason", [
    ExitReason.DONE, ExitReason.STOP_AT_STEP, ExitReason.PREEMPTED, ExitReason.SAVE_FAILED,
    ExitReason.DIVERGED, ExitReason.PEER_LOST,
])  # fmt: skip
def test_every_end_of_the_loop_is_an_event(tmp_path: Path, reason: ExitReason) -> None:
    events_of(tmp_path / "events.jsonl").ended(reason)
    (event,) = json_lines.read(tmp_path / "events.jsonl")
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
    assert json_lines.read(path)[1]["text"].startswith("rank 3: asked for 2.00 GiB")


def test_a_full_disk_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "events.jsonl"
    events = events_of(path)
    path.mkdir()
    events.began()
    assert "could not be written" in caplog.text


def test_sinks_hear_of_a_hang_that_another_process_has_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events, heard = events_of(path), list[tuple[str, str]]()
    events.listeners.append(lambda kind, text: heard.append((kind, text)))
    events.heard_of_hang("rank 1 holds the run up")
    assert heard == [("hang", "rank 1 holds the run up")]
    assert json_lines.read(path) == []


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
    saves = TimedSaves(Saver(True, False, False, True, False), events_of(path), Heartbeat())
    assert [saves.due(progress(step)) for step in (4, 5)] == [False, True]
    found = [saves.save(progress(5)) for _ in range(3)]
    assert (found, len(json_lines.read(path))) == ([True, False, False], 1)
    assert saves.fields() == {"checkpoint_s": 0.75}
    assert saves.fields() == {"checkpoint_s": 0.0}
    assert [saves.wait(), saves.wait()] == [True, False]
    assert [event["kind"] for event in json_lines.read(path)] == ["save_failed"] * 2
    assert json.loads(path.read_text().splitlines()[0])["step"] == 0
