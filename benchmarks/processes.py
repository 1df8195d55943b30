"""The processes of a running pipeline: who they are, how much memory is theirs alone.

A driver's workers are found from outside, through /proc, whichever executor started them, so that a
test can kill them and a benchmark can weigh them without their help.

    for pid in workers_of(driver.pid, "local"):
        print(own_bytes(pid))
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from data_pipeline.execute.worker_memory import own_bytes

_SLURM = b"submitit.core._submit"
"""Module that a worker of Slurm runs."""


def children(pid: int) -> list[int]:
    """Return the processes a process has started."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for child in found.split()]


def descendants(pid: int) -> Iterator[int]:
    """Yield the processes below a process."""
    for child in children(pid):
        yield child
        yield from descendants(child)


def workers_of(driver: int, executor: str) -> list[int]:
    """Return the workers of a driver; those of Ray and Slurm are all there are on the machine.

    Local workers are the children of the driver's fork server.
    """
    if executor == "local":
        return [worker for server in children(driver) for worker in children(server)]
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        words = command.split(b"\0")
        of_slurm = words[0].endswith((b"python", b"python3")) and _SLURM in words
        of_ray = command.startswith(b"ray::") and b"Agent" not in command  # those are daemons
        if of_slurm if executor == "slurm" else of_ray:
            found.append(int(path.name))
    return found


def peak_rss_bytes(pid: int) -> int:
    """Return the largest RSS the process ever had, shared pages included."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


class MemoryWatch:
    """Samples the memory of processes that come and go, until the context ends.

    ``phase`` names what they are at; ``peaks`` has the largest memory of any one process in each.
    """

    def __init__(
        self, find: Callable[[], list[int]], phase: Callable[[], str], every_s: float = 0.02
    ) -> None:
        self.find = find
        self.phase = phase
        self.every_s = every_s
        self.peaks: dict[str, int] = {}
        self.peak_rss = 0
        self.samples = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        looked, pids, phase = 0.0, list[int](), ""
        while not self._done.wait(self.every_s):
            if time.monotonic() - looked > 0.1:
                looked, pids, phase = time.monotonic(), self.find(), self.phase()
            for pid in pids:
                self.peaks[phase] = max(self.peaks.get(phase, 0), own_bytes(pid))
                self.peak_rss = max(self.peak_rss, peak_rss_bytes(pid))
            self.samples += 1
