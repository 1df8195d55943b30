"""Files of a run folder: atomic, kept over restarts, readable by a supervisor."""

import json
from pathlib import Path

import pytest

from llmtrain.errors import CheckpointError
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
