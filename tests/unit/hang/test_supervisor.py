"""When a standstill is a hang, what is left of it, and how machines judge together."""

import faulthandler
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain import json_lines
from llmtrain.hang import stacks, supervisor
from llmtrain.hang.heartbeat import Heartbeat, Phase
from llmtrain.hang.job import Job, beat_path
from llmtrain.hang.stacks import SIGNAL
from llmtrain.hang.supervisor import Supervisor

DEADLINE_S = 0.2


@pytest.fixture
def beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Heartbeat]]:
    """Two ranks, both this process, which lives; its stacks would be those of the test."""
    monkeypatch.setattr(stacks, "_ANSWER_S", 0.02)
    monkeypatch.setattr(stacks, "_SETTLE_S", 0.01)
    monkeypatch.setattr(supervisor, "_RECORD_S", 0.0)
    folder = tmp_path / "beats"
    folder.mkdir()
    made = [Heartbeat(), Heartbeat()]
    with (folder / "unread").open("w") as file:
        faulthandler.register(SIGNAL, file=file)
        for rank, beat in enumerate(made):
            beat.open(beat_path(folder, rank), rank)
            beat.begin(7, slow=False)
        over = threading.Event()

        def live() -> None:
            while not over.wait(0.02):
                for beat in made:
                    beat.live()

        thread = threading.Thread(target=live)
        thread.start()
        yield made
        over.set()
        thread.join()
        faulthandler.unregister(SIGNAL)
    for beat in made:
        beat.close()


def job(tmp_path: Path, first_rank: int = 0, num_ranks: int = 2) -> Job:
    (tmp_path / "run").mkdir(exist_ok=True)
    return Job(
        beats=tmp_path / "beats", start="3f", run=tmp_path / "run", first_rank=first_rank,
        num_ranks=num_ranks, world_size=2, host=f"n{first_rank}", deadline_s=DEADLINE_S,
        slow_s=60.0, ends=False,
    )  # fmt: skip


def look(watching: Supervisor) -> None:
    watching.look(watching._beats())


def hangs(tmp_path: Path) -> list[dict[str, object]]:
    return json_lines.read(tmp_path / "run/events.jsonl")


def test_a_job_is_read_as_it_was_told(tmp_path: Path) -> None:
    told = job(tmp_path)
    assert Job.of(json.loads(json.dumps(told.plain))) == told


@pytest.mark.parametrize(
    ("phase", "slow"),
    [
        (Phase.START, False), (Phase.EVALUATE, False), (Phase.SAVE, False), (Phase.DONE, False),
        (Phase.FORWARD, True), (Phase.BACKWARD, True), (Phase.DATA, True),
    ],
)  # fmt: skip
def test_what_may_take_longer_is_no_hang(
    phase: Phase, slow: bool, beats: list[Heartbeat], tmp_path: Path
) -> None:
    """The other rank waits for it beyond the deadline."""
    beats[0].at(phase, slow=slow)
    beats[1].at(Phase.COLLECTIVE)
    watching = Supervisor(job(tmp_path))
    time.sleep(1.5 * DEADLINE_S)
    look(watching)
    assert (hangs(tmp_path) == []) is (phase is not Phase.DONE)


def test_a_rank_without_its_batch_is_said_once_until_ranks_move(
    beats: list[Heartbeat], tmp_path: Path
) -> None:
    beats[1].at(Phase.COLLECTIVE)
    watching = Supervisor(job(tmp_path))
    look(watching)
    assert hangs(tmp_path) == []
    time.sleep(1.5 * DEADLINE_S)
    look(watching)
    look(watching)
    (event,) = hangs(tmp_path)
    assert (event["kind"], event["step"], event["ranks"]) == ("hang", 6, [0])
    assert "rank 0 (process" in str(event["text"])
    assert "it waits for its own batch" in str(event["text"])
    folder = tmp_path / "run/hang/attempt-1-step-6"
    assert "no stacks" in (folder / "rank0.txt").read_text()
    assert json.loads((folder / "verdict.json").read_text())["guilty"] == [0]
    for beat in beats:
        beat.begin(8, slow=False)
    look(watching)
    assert len(hangs(tmp_path)) == 1
    time.sleep(1.5 * DEADLINE_S)
    look(watching)
    assert len(hangs(tmp_path)) == 2


def test_a_supervisor_that_was_stopped_itself_blames_nobody(
    beats: list[Heartbeat], tmp_path: Path
) -> None:
    watching = Supervisor(job(tmp_path))
    time.sleep(1.5 * DEADLINE_S)
    watching._last_ns -= int(60e9)  # as after the suspension of the machine
    look(watching)
    assert hangs(tmp_path) == []


def test_two_machines_judge_together(beats: list[Heartbeat], tmp_path: Path) -> None:
    """Rank 0 waits, rank 1 on the other machine sleeps in a forward."""
    first, second = (Supervisor(job(tmp_path, rank, 1)) for rank in (0, 1))
    beats[0].at(Phase.COLLECTIVE)
    beats[1].at(Phase.FORWARD, 2)
    deadline = time.monotonic() + 10
    while not hangs(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        look(second)
        look(first)
    look(second)
    (event,) = hangs(tmp_path)
    assert event["ranks"] == [1]
    assert "on n1) holds the run up" in str(event["text"])
    assert {path.name for path in (tmp_path / "run/hang/attempt-1-step-6").iterdir()} >= {
        "rank0.txt", "rank1.txt", "verdict.json",
    }  # fmt: skip


def test_a_machine_that_answers_no_more_is_named(beats: list[Heartbeat], tmp_path: Path) -> None:
    first, _ = (Supervisor(job(tmp_path, rank, 1)) for rank in (0, 1))
    beats[0].at(Phase.COLLECTIVE)
    deadline = time.monotonic() + 20
    while not hangs(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        look(first)
    (event,) = hangs(tmp_path)
    assert event["ranks"] == [1]
    assert "n1" in str(event["text"])
    assert "no answer from its machine" in str(event["text"])


def test_a_machine_whose_ranks_may_take_longer_says_so_when_asked(
    beats: list[Heartbeat], tmp_path: Path
) -> None:
    first, second = (Supervisor(job(tmp_path, rank, 1)) for rank in (0, 1))
    beats[0].at(Phase.COLLECTIVE)
    until = time.monotonic() + 5 * DEADLINE_S
    while time.monotonic() < until:
        beats[1].at(Phase.SAVE)
        look(first)
        look(second)
        time.sleep(0.02)
    assert hangs(tmp_path) == []
