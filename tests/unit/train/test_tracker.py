"""Weights & Biases online: a resumed run adds what the server lacks, whatever was sent before."""

import json
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from llmtrain import json_lines
from llmtrain.config.training import MonitorConfig
from llmtrain.run.directory import RunDirectory
from llmtrain.train import tracker
from llmtrain.train.tracker import SUPERSEDED, wandb_sink
from tests.wandb_server import WandbServer


def rows(first: int, last: int, attempt: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "num_steps": 20, "loss": 1 / step, "attempt": attempt, "time": 1e9 + step}
        for step in range(first, last + 1)
    ]


def test_online_runs_go_on_where_the_server_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 6 online, 5 to 8 offline after a kill, then online again from 7 on."""
    import wandb

    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    page = run.path / "config.yaml"
    page.write_text("model: {}\n")
    past = rows(1, 4, 1)
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        online, offline = MonitorConfig(wandb="online"), MonitorConfig(wandb="offline")
        with wandb_sink(online, run, {"a": 1}) as tracker:
            assert tracker is not None
            tracker.describe({"attempt": 1}, page)
            for row in rows(1, 6, 1):
                tracker.write(row)
            tracker.alert("spike", "loss 9 is far above")
            tracker.alert("resumed", "is no alert")
        with wandb_sink(offline, run, {"a": 1}) as tracker:
            assert tracker is not None
            tracker.catch_up(past)
            for row in rows(5, 8, 2):
                tracker.write(row)
        past += rows(5, 6, 2)
        with wandb_sink(online, run, {"a": 1}) as tracker:
            assert tracker is not None
            tracker.catch_up(past)
            for row in rows(7, 9, 3):
                tracker.write(row)
        wandb.teardown()
    (name,) = server.runs
    assert name == json.loads(run.run_json.read_text())["wandb_id"]
    history = server.history(name)
    assert [(row["train_step"], row["attempt"]) for row in history] == [
        *((step, 1) for step in range(1, 7)), (7, 3), (8, 3), (9, 3),
    ]  # fmt: skip
    assert [row["_timestamp"] for row in history] == [1e9 + step for step in range(1, 10)]
    (alert,) = server.alerts
    assert (alert["title"], alert["severity"]) == ("run: spike", "WARN")
    assert server.files[f"{name}/llmtrain/config.yaml"] == page.read_bytes()
    assert page.read_text() == "model: {}\n"
    assert len(list((run.path / "wandb" / SUPERSEDED).iterdir())) == 1
    assert server.unknown == []


def test_online_a_rollback_adds_lines_that_the_attempt_tells_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 6, back to 4, on to 7, back to 5, on to 8: what was sent stays, in order."""
    import wandb

    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    online, past = MonitorConfig(wandb="online"), list[dict[str, Any]]()
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for attempt, first, last, back in ((1, 1, 6, 4), (2, 5, 7, 5), (3, 6, 8, 8)):
            with wandb_sink(online, run, {}) as tracker:
                assert tracker is not None
                tracker.catch_up(past)
                for row in rows(first, last, attempt):
                    tracker.write(row)
            past = [row for row in [*past, *rows(first, last, attempt)] if row["step"] <= back]
            event = {"kind": "rollback", "attempt": attempt, "reached": last, "to_step": back}
            if attempt < 3:
                json_lines.append(run.events_jsonl, event)
        wandb.teardown()
    (name,) = server.runs
    history = server.history(name)
    assert [(row["attempt"], row["train_step"]) for row in history] == [
        *((1, step) for step in range(1, 7)), *((2, step) for step in range(5, 8)),
        *((3, step) for step in range(6, 9)),
    ]  # fmt: skip
    assert [row["_step"] for row in history] == list(range(1, 13))


def test_a_service_that_does_not_start_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    wandb.teardown()  # else that of another test would serve
    service = "wandb.sdk.lib.service.service_process.get_core_path"
    monkeypatch.setattr(service, lambda: "/bin/false")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    with wandb_sink(MonitorConfig(wandb="offline"), run, {}) as sink:
        assert sink is None
    assert "Weights & Biases: off (ServicePollForTokenError: " in caplog.text


class FallsSilent(WandbServer):
    """A server that accepts connections and answers none of them while ``talks`` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.talks = Event()
        self.talks.set()

    def stream(self, run: str, body: dict[str, Any]) -> dict[str, Any]:
        self.talks.wait()
        return super().stream(run, body)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.talks.wait()
        return super().answer(query, variables)


def test_a_server_that_stops_answering_holds_the_end_up_for_so_long_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it did not take comes with the next start, once it answers again."""
    import wandb

    monkeypatch.setattr(tracker, "FINISH_S", 2.0)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    online = MonitorConfig(wandb="online")
    with FallsSilent() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with wandb_sink(online, run, {}) as sink:
            assert sink is not None
            sink.write(rows(1, 1, 1)[0])
        with wandb_sink(online, run, {}) as sink:
            assert sink is not None
            server.talks.clear()
            for row in rows(2, 5, 1):
                sink.write(row)
            left = time.monotonic()
        assert time.monotonic() - left < 10
        assert "has not taken everything in 2 s; the next start of this run sends" in caplog.text
        server.talks.set()
        with wandb_sink(online, run, {}) as sink:
            assert sink is not None
            sink.catch_up(rows(1, 5, 1))
            sink.write(rows(6, 6, 2)[0])
        wandb.teardown()
    (name,) = server.runs
    assert [row["train_step"] for row in server.history(name)] == list(range(1, 7))
