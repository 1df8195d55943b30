"""A supervisor: who is asked to stop, who is started again, and how the run ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmtrain.launch.supervise import outcome, ranks_below, supervise, supervise_hosts
from llmtrain.run.directory import ExitReason, RunDirectory

RANK = """\
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
(folder / f"up-{os.environ['RANK']}").touch()
while not asked:
    time.sleep(0.02)
(folder / "status.json").write_text(json.dumps({"code": 3}))
"""
LAUNCHER = """\
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(i)})
         for i in range(2)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    """A command that starts two ranks, which stop when they are asked."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    return [sys.executable, *(str(tmp_path / n) for n in ("launcher.py", "rank.py")), str(tmp_path)]


def when_up(folder: Path, action: threading.Thread | None = None) -> None:
    deadline = time.monotonic() + 60
    while not all((folder / f"up-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_request_reaches_the_ranks_and_the_run_says_how_it_ended(
    launcher: list[str], tmp_path: Path, number: int
) -> None:
    def ask() -> None:
        when_up(tmp_path)
        os.kill(os.getpid(), number)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    thread = threading.Thread(target=ask)
    thread.start()
    assert supervise(launcher, tmp_path) == 3
    thread.join()
    assert before == {each: signal.getsignal(each) for each in before}


def test_ranks_are_the_topmost_processes_with_a_rank(launcher: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(launcher) as process:
        when_up(tmp_path)
        ranks = ranks_below(process.pid)
        assert len(ranks) == 2
        assert ranks_below(ranks[0]) == []
        for rank in ranks:
            os.kill(rank, signal.SIGUSR1)
    assert process.returncode == 0


def test_a_launcher_whose_ranks_have_left_is_not_asked(launcher: list[str], tmp_path: Path) -> None:
    """It waits for those of other nodes, which were asked first, and then ends by itself."""
    waits = (
        "import subprocess, sys, time, pathlib; ended = subprocess.run(sys.argv[2:]).returncode; "
        "pathlib.Path(sys.argv[1]).touch(); time.sleep(1.5); sys.exit(ended)"
    )
    left = tmp_path / "left"

    def ask() -> None:
        when_up(tmp_path)
        time.sleep(1.0)  # ranks train for longer
        for rank in ranks_below(os.getpid()):
            os.kill(rank, signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while not left.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert supervise([sys.executable, "-c", waits, str(left), *launcher], None) == 0
    thread.join()


def test_a_supervisor_on_a_host_stops_with_whoever_started_it(
    launcher: list[str], tmp_path: Path
) -> None:
    words = [
        sys.executable,
        "-m",
        "llmtrain.launch.supervise",
        f"run={tmp_path}",
        "tied=true",
        "--",
    ]

    def ask() -> None:
        when_up(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert supervise_hosts([[*words, *launcher]], tmp_path) == 3
    thread.join()


def test_ranks_do_not_outlive_a_supervisor_that_is_killed(
    launcher: list[str], tmp_path: Path
) -> None:
    guard = [sys.executable, "-m", "llmtrain.launch.supervise", "--"]
    with subprocess.Popen([*guard, *guard, *launcher]) as outer:
        when_up(tmp_path)
        ranks = ranks_below(outer.pid)
        outer.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert json.loads((tmp_path / "status.json").read_text()) == {"code": 3}


def test_a_host_that_fails_stops_the_others(launcher: list[str], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "llmtrain.launch.supervise", "tied=true", "--", *launcher]
    wait = f"while [ ! -e {tmp_path}/up-1 ]; do sleep 0.05; done; exit 7"
    assert supervise_hosts([["bash", "-c", wait], words], tmp_path / "no run") == 1


def test_a_fault_is_started_again_and_wrong_input_is_not(tmp_path: Path) -> None:
    count = f"echo x >> {tmp_path}/starts; "
    starts = tmp_path / "starts"
    again = f"{count} [ $(wc -l < {starts}) -ge 3 ]"
    assert supervise(["bash", "-c", again], tmp_path, max_restarts=5) == 0
    assert len(starts.read_text().split()) == 3
    assert supervise(["bash", "-c", f"{count} exit 2"], tmp_path, max_restarts=5) == 2
    assert len(starts.read_text().split()) == 4
    assert supervise(["bash", "-c", f"{count} exit 4"], tmp_path, max_restarts=5) == 4
    assert len(starts.read_text().split()) == 5
    assert supervise(["bash", "-c", f"{count} exit 7"], tmp_path, max_restarts=1) == 1
    assert len(starts.read_text().split()) == 7


def test_what_a_batch_system_sends_to_all_does_not_end_the_launcher_of_a_node() -> None:
    script = "kill -TERM $$; kill -USR1 $$; exit 3"
    assert supervise(["bash", "-c", script], None) == 3
    assert supervise(["bash", "-c", "kill -INT $PPID; exec sleep 9"], None) == 1


def test_a_stopped_run_is_not_started_again(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/starts; kill -TERM $PPID; sleep 0.3; exit 7"
    assert supervise(["bash", "-c", script], tmp_path, max_restarts=5) == 1
    assert (tmp_path / "starts").read_text() == "x\n"


@pytest.mark.parametrize(
    ("code", "status"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (7, 1), (-9, 1)]
)
def test_without_a_new_status_the_launchers_counts(tmp_path: Path, code: int, status: int) -> None:
    assert outcome(code, tmp_path, None) == status
    (tmp_path / "status.json").write_text(json.dumps({"code": 2}))
    about = (tmp_path / "status.json").stat()
    assert outcome(code, tmp_path, (about.st_ino, about.st_mtime_ns)) == status


@pytest.mark.parametrize("reason", list(ExitReason))
def test_a_new_status_counts_whatever_the_launcher_says(tmp_path: Path, reason: ExitReason) -> None:
    RunDirectory(tmp_path).write_status(reason, step=4)
    assert outcome(1, tmp_path, None) == outcome(0, tmp_path, None) == reason.code
