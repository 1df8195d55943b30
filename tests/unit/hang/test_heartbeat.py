"""What a rank says of itself is what another process reads."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import orjson
import pytest

from llmtrain.hang.heartbeat import (
    Heartbeat,
    Phase,
    ask_for_record,
    process_state,
    read_beat,
    start_ticks,
)


def test_no_room_for_a_beat_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Heartbeat().open(tmp_path / "rank-0", rank=0)


def test_a_beat_is_read_as_it_was_said(tmp_path: Path) -> None:
    path, beat = tmp_path / "rank-3", Heartbeat()
    beat.begin(2, slow=True)  # to nobody
    assert read_beat(path) is None
    beat.open(path, rank=3)
    before = time.monotonic_ns()
    beat.begin(step=12, slow=False)
    beat.at(Phase.BACKWARD, 5)
    seen = read_beat(path)
    assert seen is not None
    assert (seen.rank, seen.pid, seen.step) == (3, os.getpid(), 12)
    assert seen.sentence == "step 12, backward of micro-batch 5"
    assert seen.main_thread == threading.main_thread().ident
    assert before <= seen.since_ns <= time.monotonic_ns()
    beat.close()
    beat.at(Phase.FORWARD)  # to nobody again
    last = read_beat(path)
    assert last is not None
    assert last.phase is Phase.DONE


def test_a_wait_is_a_phase_of_its_own_and_the_one_before_goes_on(tmp_path: Path) -> None:
    path, beat = tmp_path / "rank-0", Heartbeat()
    beat.open(path, rank=0)
    beat.at(Phase.FORWARD, 2, slow=True)
    with beat.waiting:
        inside = read_beat(path)
    after = read_beat(path)
    assert inside is not None
    assert after is not None
    assert (inside.phase, inside.microbatch, inside.slow) == (Phase.COLLECTIVE, 2, True)
    assert (after.phase, after.microbatch, after.slow) == (Phase.FORWARD, 2, True)
    assert after.since_ns > inside.since_ns
    beat.close()


def test_a_flight_record_is_asked_for_once(tmp_path: Path) -> None:
    path, beat = tmp_path / "rank-0", Heartbeat()
    beat.open(path, rank=0)
    assert not beat.live()
    ask_for_record(path)
    assert [beat.live(), beat.live()] == [True, False]
    beat.close()


def test_the_state_of_a_process() -> None:
    process = subprocess.Popen(["sleep", "60"])
    started = start_ticks(process.pid)
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while process_state(process.pid, started) != "T":
        assert time.monotonic() < deadline
    assert process_state(process.pid, started + 1) == "X"  # its number was given again
    process.kill()
    process.wait()
    assert process_state(process.pid, started) == "X"


def test_a_beat_costs_nanoseconds() -> None:
    beat, count = Heartbeat(), 20_000
    started = time.process_time()
    for number in range(count):
        beat.at(Phase.FORWARD, number)
    assert (time.process_time() - started) / count < 5e-6  # 1 µs; busy machines


def test_the_supervisor_imports_no_torch() -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; import llmtrain.hang.supervisor; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'numpy'}))"
    )
    roots = [str(Path(__file__).parents[3]), str(Path(orjson.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program, *roots], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
