"""Real ranks that hang: the supervisor names the one at fault, keeps the evidence, ends the run."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.end_to_end import hangs
from tests.end_to_end.commands import TINY, Command, make_store, status, steps

DEADLINE_S = 4.0
GRACE_S = 5.0


@pytest.mark.parametrize(
    ("layout", "machines", "fault", "said"),
    [
        ("parallel.pp=2", 1, "stop", "is stopped by a signal (state T)"),
        ("parallel.dp_shard=2", 1, "data", "it waits for its own batch"),
        ("parallel.pp=2", 2, "python", "it is not inside a collective"),
    ],
)
def test_the_rank_at_fault_is_named_in_time(
    layout: str, machines: int, fault: str, said: str, tmp_path: Path
) -> None:
    make_store(tmp_path / "web", seed=0)
    words = hangs.words(tmp_path, "still", DEADLINE_S, layout)
    command, run = hangs.start(words, tmp_path, ranks=2, nodes=machines)
    try:
        hangs.under_way(command, run)
        rank = random.Random(f"{layout} {fault}").randrange(2)
        pids = command.ranks
        event, took_s = hangs.noticed(command, run, hangs.hit(command, run, rank, fault))
        assert command.wait() != 0
    finally:
        command.kill()
    text = event["text"]
    assert event["ranks"] == [rank], text
    assert text.startswith(f"rank {rank} (process {pids[rank]} on ")
    assert said in text
    assert f"; rank {1 - rank} is waiting for it; the run is ended" in text
    assert took_s < DEADLINE_S + GRACE_S
    assert f"error: {text}" in command.output
    assert (status(run)["code"], status(run)["reason"]) == (1, "hung")
    assert status(run)["step"] == event["step"]
    _assert_evidence(run, event["step"], rank, fault)
    _assert_supervisor_gone(run)


def _assert_evidence(run: Path, step: int, rank: int, fault: str) -> None:
    folder = run / f"hang/attempt-1-step-{step}"
    stacks = [(folder / f"rank{number}.txt").read_text() for number in range(2)]
    assert "most recent call first" in stacks[1 - rank]
    assert ("_hang" in stacks[rank]) is (fault != "stop")
    if fault == "stop":
        assert "State:\tT (stopped)" in stacks[rank]
    record = folder / f"rank{1 - rank}.flight.json"
    assert isinstance(json.loads(record.read_text()), dict)
    assert json.loads((folder / "verdict.json").read_text())["guilty"] == [rank]


def _assert_supervisor_gone(run: Path) -> None:
    """It outlives its ranks by a moment."""
    deadline = time.monotonic() + 20
    while any(str(run).encode() in _command_line(p) for p in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_it_may_only_be_reported(tmp_path: Path) -> None:
    make_store(tmp_path / "web", seed=0)
    words = hangs.words(tmp_path, "still", 2.0, "parallel.pp=2", "monitor.hang_action=report")
    command, run = hangs.start(words, tmp_path, ranks=2)
    hangs.under_way(command, run)
    hangs.noticed(command, run, hangs.hit(command, run, 1, "stop"))
    _goes_on(command, run)
    assert command.wait() == 0, command.output
    assert "the run is left as it is" in command.output


def _goes_on(command: Command, run: Path) -> None:
    """Let the stopped rank go on, and the run end by itself."""
    seen = steps(run)[-1]
    os.kill(command.ranks[1], signal.SIGCONT)
    command.until(lambda: steps(run)[-1] > seen)
    command.send(signal.SIGTERM)


def test_a_run_whose_reader_is_gone_comes_to_its_end(tmp_path: Path) -> None:
    """Who read its console was killed: neither the run nor its supervisor waits for anybody."""
    make_store(tmp_path / "web", seed=0)
    console, run = tmp_path / "console", tmp_path / "alone"
    os.mkfifo(console)
    with subprocess.Popen(["cat", str(console)], stdout=subprocess.DEVNULL) as reader:
        words = [
            "train", *TINY, "name=alone", f"runs_dir={tmp_path}", f"monitor.hang_s={DEADLINE_S:g}",
            f"data.sources.web={tmp_path}/web", "training.num_tokens=51200", "parallel.pp=2",
        ]  # fmt: skip
        command = Command(words, console, ranks=2)
        deadline = time.monotonic() + Command.time_limit_s
        while not steps(run) and time.monotonic() < deadline:
            time.sleep(0.01)
        reader.kill()
    seen = steps(run)[-1]
    assert command.wait() == 0
    assert steps(run)[-1] == 200 > seen
    _assert_supervisor_gone(run)
