"""Files of a run folder: atomic, kept over restarts, readable by a supervisor."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.run.directory import ExitReason, RunDirectory, read_json, write_json


def test_the_first_record_is_kept(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "demo")
    assert run.record(name="demo", wandb_id="first") == {"name": "demo", "wandb_id": "first"}
    assert run.record(wandb_id="second", seed=1)["wandb_id"] == "first"
    assert json.loads(run.run_json.read_text()) == {
        "name": "demo", "wandb_id": "first", "seed": 1
    }  # fmt: skip


def test_status_says_code_reason_and_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_status(ExitReason.PREEMPTED, step=7)
    assert json.loads(run.status_json.read_text()) == {"code": 3, "reason": "preempted", "step": 7}
    run.clear_status()
    run.clear_status()
    assert not run.status_json.exists()


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (ExitReason.DONE, 0),
        (ExitReason.STOP_AT_STEP, 0),
        (ExitReason.REFUSED, 2),
        (ExitReason.PREEMPTED, 3),
        (ExitReason.PEER_LOST, 1),
        (ExitReason.DIVERGED, 4),
        (ExitReason.SAVE_FAILED, 4),
        (ExitReason.FAILED, 1),
    ],
)
def test_exit_statuses(reason: ExitReason, status: int) -> None:
    assert reason.code == status


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("text", ['{"a": ', "[1]"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    run = RunDirectory(tmp_path)
    run.run_json.write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json .*delete it"):
        run.read_record()


def test_a_fault_of_a_run_that_is_being_ended_for_a_hang_is_that_hang(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_status(ExitReason.HUNG, step=7)
    run.write_status(ExitReason.FAILED, step=8)
    assert read_json(run.status_json) == {"code": 1, "reason": "hung", "step": 7}
    run.write_status(ExitReason.DONE, step=8)
    assert read_json(run.status_json)["reason"] == "done"


def test_a_killed_holder_is_waited_for_until_what_it_was_starting_lets_go(tmp_path: Path) -> None:
    """A fork holds the lock until its exec; the killed process had one."""
    code = (
        "import os, signal, subprocess, sys; from pathlib import Path;"
        "from llmtrain.run.directory import RunDirectory;"
        "held = RunDirectory(Path(sys.argv[1])).locked(); held.__enter__();"
        "files = {int(fd) for fd in os.listdir('/proc/self/fd')} - {0, 1, 2};"
        "fds = [fd for fd in files if os.path.exists(f'/proc/self/fd/{fd}')"
        " and os.readlink(f'/proc/self/fd/{fd}').endswith('lock')];"
        "assert fds; subprocess.Popen(['sleep', '1'], pass_fds=fds);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = RunDirectory(tmp_path / "run")
    ended = subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    started = time.monotonic()
    with run.locked():
        assert time.monotonic() - started > 0.2
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "):
            RunDirectory(run.path).locked().__enter__()
    assert time.monotonic() - started < 4.0
