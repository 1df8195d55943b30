"""metrics.jsonl over restarts, the console line, and what Weights & Biases is told."""

import fcntl
import json
import logging
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest

from llmtrain import json_lines, logs
from llmtrain.config.training import MonitorConfig
from llmtrain.errors import ConfigError
from llmtrain.run.directory import RunDirectory
from llmtrain.train import tensorboard, tracker
from llmtrain.train.metrics import Row
from llmtrain.train.monitor import Console, JsonLines, console_line


def row(step: int) -> Row:
    return {
        "step": step,
        "num_steps": 100,
        "tokens": step * 8,
        "loss": 3.25,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "tokens_per_s": 12345.6,
        "mfu": None,
        "mfu_convention": "text",
        "step_time_s": 2.0,
        "skipped_steps": 0,
        "source_loss": {"web": 3.0},
        "time": 1.0,
    }


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path, after_step=0) as lines:
        for step in (10, 20, 30):
            lines.write(row(step))
            assert steps(path)[-1] == step
    with JsonLines(path, after_step=20) as lines:
        lines.write(row(25))
    assert steps(path) == [10, 20, 25]


def test_a_run_that_starts_over_has_no_rows_of_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path, after_step=0) as lines:
        lines.write(row(10))
    with JsonLines(path, after_step=0):
        pass
    assert steps(path) == []


def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(10)) + "\n" + json.dumps(row(20))[:30])
    assert [r["step"] for r in json_lines.read(path)] == [10]
    with JsonLines(path, after_step=20) as lines:
        lines.write(row(20))
    assert steps(path) == [10, 20]


def test_console_line() -> None:
    line = console_line(row(40))
    assert line == (
        "step 40/100 | loss 3.2500 | lr 3.00e-04 | grad norm 0.500 | 12,346 tokens/s | 2:00 left"
    )


def test_console_line_with_everything() -> None:
    full = {
        **row(40),
        "mfu": 0.4123,
        "skipped_steps": 2,
        "loss": None,
        "step_time_s": 100.0,
        "validation_loss": {"web": 3.5},
    }
    assert console_line(full) == (
        "step 40/100 | loss not finite | lr 3.00e-04 | grad norm 0.500 | 12,346 tokens/s | "
        "MFU 41.2% | skipped 2 | held-out web 3.5000 | 1:40:00 left"
    )


def test_the_console_logs_a_line_and_shows_no_bar_without_a_terminal(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), Console(100, 0, progress_bar=True) as console:
        console.write(row(10))
    assert "step 10/100" in caplog.text
    assert capsys.readouterr().err == ""


def test_a_rank_far_behind_the_others_is_named() -> None:
    times = {"min": 0.9, "median": 1.0, "max": 1.2, "slowest_rank": 3}
    assert "rank" not in console_line({**row(40), "rank_step_time_s": times})
    line = console_line({**row(40), "rank_step_time_s": {**times, "max": 1.5}})
    assert "tokens/s | rank 3 is 1.5 x slower | 2:00 left" in line


def read_until_closed(terminal: int) -> bytes:
    """The next bytes of a terminal; none once all of it is read and its other side is closed."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_on_a_terminal_one_live_line_goes_on_from_the_resumed_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        logs.setup(tmp_path)
        with Console(100, 20, progress_bar=True) as console:
            console.write(row(40))
            console.write({**row(60), "mfu": 0.5})
    shown = b"".join(iter(lambda: read_until_closed(ours), b""))
    os.close(ours)
    live = [line.strip() for line in shown.decode().split("\r") if "step" in line]
    assert live[0].endswith("| step 20/100")
    assert [line for line in live if "step 40" in line]
    assert live[-1].startswith("60%|")
    assert "loss 3.2500" in live[-1]
    assert "12,346 tokens/s | MFU 50.0% | 1:20 left" in live[-1]
    assert shown.count(b"\n") == 1  # the lines replace each other
    log = (tmp_path / "logs" / "rank0.log").read_text()
    assert "step 40/100" in log
    assert "step 60/100" in log


def test_numbers_reach_weights_and_biases_by_flat_names() -> None:
    assert tracker.flat(row(40)) == {
        "train_step": 40,
        "tokens": 320,
        "loss": 3.25,
        "grad_norm": 0.5,
        "lr": 3e-4,
        "tokens_per_s": 12345.6,
        "step_time_s": 2.0,
        "skipped_steps": 0,
        "source_loss/web": 3.0,
    }


def test_wandb_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"run pip install 'wandb>=0\.31' or use monitor\.wandb"):
        tracker.check_tracker(MonitorConfig(wandb="online"))
    tracker.check_tracker(MonitorConfig(wandb="auto"))
    tracker.check_tracker(MonitorConfig(wandb="disabled"))


def test_a_name_that_wandb_refuses_is_wrong_input() -> None:
    tracker.check_tracker(MonitorConfig(wandb="offline", wandb_project="mine"))
    with pytest.raises(ConfigError, match=r"wandb_project=a/b .* cannot contain .* use another"):
        tracker.check_tracker(MonitorConfig(wandb="offline", wandb_project="a/b"))


def test_wandb_not_asked_for_and_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker, "_installed", lambda: False)
    run = RunDirectory(tmp_path)
    with caplog.at_level(logging.INFO), tracker.wandb_sink(MonitorConfig(), run, {}) as sink:
        assert sink is None
    assert "Weights & Biases: off (wandb is not installed; pip install" in caplog.text
    assert not run.run_json.exists()


def test_tensorboard_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"run pip install 'tensorboard>=2\.20' or use"):
        tensorboard.check_tensorboard(MonitorConfig(tensorboard=True))
    tensorboard.check_tensorboard(MonitorConfig())


def test_a_trial_of_a_sweep_is_in_its_group(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "sweep-12ab" / "trial-3")
    run.path.mkdir(parents=True)
    assert tracker._group(MonitorConfig(), run) is None
    (run.path.parent / "sweep.json").write_text("{}")
    assert tracker._group(MonitorConfig(), run) == "sweep-12ab"
    assert tracker._group(MonitorConfig(wandb_group="mine"), run) == "mine"
