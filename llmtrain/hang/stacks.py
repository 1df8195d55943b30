"""Where the threads of a rank stand, and whether its main thread waits for other ranks.

A rank has registered faulthandler for SIGUSR2 (see train/watchdog.py): the dump needs neither its
main thread nor Python's lock. ``kill -USR2 PID`` by hand does the same.

Invariant: asking changes nothing in a rank that runs, and a rank that is stopped stays stopped.

    stacks = ask(pids={0: 4711}, folder)        # {0: "Thread 0x... (most recent call first): ..."}
    waits(stacks[0], main_thread)               # True: inside a collective
"""

import linecache
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from os import kill
from pathlib import Path

SIGNAL = signal.SIGUSR2
"""Has a rank write the stacks of its threads."""

_ANSWER_S = 2.0
_SETTLE_S = 0.1
_PY_SPY_S = 10.0

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_WAIT = re.compile(
    r"\.wait\(|wait_tensor|_c10d_functional|all_reduce|all_gather|reduce_scatter|all_to_all|"
    r"broadcast|barrier|i?recv\(|i?send\(|gather_object"
)
_TRANSPARENT = ("/torch/_ops.py", "/torch/utils/", "/contextlib.py", "/torch/library.py")
"""Frames between a collective and who called it."""


def stack_path(folder: Path, rank: int) -> Path:
    """File a rank writes its stacks to."""
    return folder / f"stacks-{rank}"


def ask(pids: Mapping[int, int], folder: Path) -> dict[int, str]:
    """Stacks by rank, of those that answer in time."""
    before = {rank: _size(stack_path(folder, rank)) for rank in pids}
    for pid in pids.values():
        with suppress(ProcessLookupError):
            kill(pid, SIGNAL)
    deadline = time.monotonic() + _ANSWER_S
    found: dict[int, str] = {}
    while len(found) < len(pids) and time.monotonic() < deadline:
        sizes = {rank: _size(stack_path(folder, rank)) for rank in pids}
        time.sleep(_SETTLE_S)
        for rank, size in sizes.items():
            path = stack_path(folder, rank)
            if before[rank] < size == _size(path):
                with path.open("rb") as file:
                    file.seek(before[rank])
                    found[rank] = file.read().decode(errors="replace")
    return found


def py_spy(pid: int) -> str | None:
    """Stacks with native frames, where py-spy is installed and may look; of stopped ones, too."""
    beside = Path(sys.executable).parent / "py-spy"
    program = shutil.which("py-spy") or (str(beside) if beside.exists() else None)
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            capture_output=True, text=True, timeout=_PY_SPY_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def frames(stack: str, thread: int) -> list[tuple[str, int, str]]:
    """File, line and function of a thread's frames, the innermost first."""
    found: list[tuple[str, int, str]] = []
    inside = False
    for line in stack.splitlines():
        if head := _THREAD.match(line):
            inside = int(head[1], 16) == thread
        elif inside and (frame := _FRAME.match(line)):
            found.append((frame[1], int(frame[2]), frame[3]))
    return found


def waits(stack: str, thread: int) -> bool:
    """Whether a thread stands in a collective, or waits for a message of another rank."""
    for file, line, _ in frames(stack, thread):
        path = file.replace("\\", "/")
        if any(part in path for part in _TRANSPARENT):
            continue
        if "/torch/distributed/" in path:
            return True
        source = linecache.getline(file, line)
        if "/llmtrain/parallel/" in path:
            return _WAIT.search(source) is not None
        return "_c10d_functional" in source or "wait_tensor" in source
    return False


def place(stack: str, thread: int) -> str:
    """The innermost frame of a thread in words; empty where there is none."""
    for file, line, function in frames(stack, thread)[:1]:
        return f"{function} ({'/'.join(Path(file).parts[-2:])}:{line})"
    return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
