"""One command on whatever number of ranks there is: the same batches, the same losses."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end.commands import (
    TINY,
    Command,
    losses,
    make_store,
    rows,
    run_torchrun,
    saved_steps,
    status,
    steps,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def train(folder: Path, name: str, *words: str, ranks: int = 1, code: int = 0) -> str:
    """Start (or go on with) a run; returns what it printed."""
    command = Command(
        ["train", *TINY, f"name={name}", f"runs_dir={folder}", f"data.sources.web={folder}/store",
         *words],
        folder / f"{name}-{ranks}.log", ranks,
    )  # fmt: skip
    assert command.wait() == code, command.output
    return command.output


def test_two_then_four_then_one_then_three_ranks_are_one_undisturbed_run(tmp_path: Path) -> None:
    make_store(tmp_path / "store", seed=0)
    train(tmp_path, "straight", "training.stop_at_step=8")
    run = tmp_path / "moved"
    for step, ranks in ((2, 2), (4, 4), (6, 1), (8, 3)):
        output = train(tmp_path, "moved", f"training.stop_at_step={step}", ranks=ranks)
        assert status(run) == {"code": 0, "reason": "stop_at_step", "step": step}
        assert ("4 of 12 rows" in output) == (ranks == 3)
    expected, found = losses(tmp_path / "straight"), losses(run)
    assert steps(run) == list(range(1, 9))
    assert max(abs(found[step] / expected[step] - 1) for step in found) <= 1e-6
    assert [row["tokens"] for row in rows(run)] == [256 * step for step in range(1, 9)]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    layouts = [event["layout"]["dp_shard"] for event in events if "layout" in event]
    assert layouts == [2, 4, 1, 3]
    assert "dp_shard: auto" in (run / "config.yaml").read_text()


def test_a_run_stops_and_saves_before_its_time_is_up(tmp_path: Path) -> None:
    make_store(tmp_path / "store", seed=0)
    words = ("training.num_tokens=100_000_000", "training.max_time_s=1.5", "checkpoint.grace_s=0.5")
    train(tmp_path, "timed", *words, code=3)
    run = tmp_path / "timed"
    step = status(run)["step"]
    assert status(run) == {"code": 3, "reason": "time_limit", "step": step}
    assert saved_steps(run)[-1] == steps(run)[-1] == step
    last = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "preempted"
    assert last["text"].startswith("training.max_time_s leaves ")


def test_torchrun_starts_a_run_again_from_its_newest_checkpoint(tmp_path: Path) -> None:
    make_store(tmp_path / "store", seed=0)
    train(tmp_path, "calm", ranks=2)
    words = [
        "train", *TINY, "name=killed", f"runs_dir={tmp_path}",
        f"data.sources.web={tmp_path}/store", "checkpoint.every_steps=10",
    ]  # fmt: skip
    run = tmp_path / "killed"
    body = partial(run_torchrun, max_restarts=1)
    command = Command(words, tmp_path / "killed.log", body=body)
    command.until(lambda: bool(saved_steps(run)))
    os.kill(command.children[-1], signal.SIGKILL)
    assert command.wait() == 0, command.output
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    started = [event for event in events if event["kind"] in ("start", "resumed")]
    assert [event["kind"] for event in started] == ["start", "resumed"]
    assert started[1]["step"] in (10, 20, 30)
    assert status(run) == {"code": 0, "reason": "done", "step": 40}
    assert losses(run) == losses(tmp_path / "calm")
