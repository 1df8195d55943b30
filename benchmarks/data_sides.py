"""Two sides of a comparison: worker processes that run stages on request, and what they cost.

Every side has as many workers as the machine has cores to give; a worker answers one request at a
time, and while one side works the other waits. Memory is read while they work, over each worker
and its children: PSS (pages shared with others divided among them) and USS (what would be freed).

    with Side("datatrove", [python, "peers/datatrove_stages.py"]) as side:
        side.run("filters", [{"input": a, "rank": 0}, {"input": b, "rank": 1}]).seconds
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from worker import Worker, WorkerError

WORKERS = 2
"""Processes of a side."""
SAMPLE_S = 0.1
"""Seconds between two looks at the memory."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, "RAYON_NUM_THREADS": 1,
    "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": 0,
}  # fmt: skip
"""One thread per process, on both sides, and no network."""


@dataclass(slots=True)
class Measured:
    """What some work cost a side."""

    seconds: float = 0.0
    """Wall time: of each phase, that of the slowest worker."""
    cpu_seconds: float = 0.0
    """Processor time of all workers."""
    pss_mb: float = 0.0
    """Largest PSS of all workers together, in MB."""
    uss_mb: float = 0.0
    """Largest USS of all workers together, in MB."""
    results: list[Any] = field(default_factory=list)
    """What the workers returned, in the order of the jobs."""

    def add(self, other: "Measured") -> None:
        """Add a phase that ran after this one."""
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds
        self.pss_mb = max(self.pss_mb, other.pss_mb)
        self.uss_mb = max(self.uss_mb, other.uss_mb)
        self.results = other.results

    def sum(self, name: str) -> int:
        """Add up a number that every worker returned."""
        return sum(int(result[name]) for result in self.results)


class Side:
    """Worker processes of one side."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        """Start the workers with ``command``; ``log`` gets what they say."""
        self.name = name
        self._workers = [Worker(name, command, log, **ENVIRONMENT) for _ in range(WORKERS)]

    def __enter__(self) -> "Side":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the workers end."""
        for worker in self._workers:
            worker.close()

    def run(
        self, stage: str, jobs: Sequence[Mapping[str, Any]], *, driver: bool = False
    ) -> Measured:
        """Run a phase: one job on each worker, at the same time.

        With ``driver`` the one job runs on processes that the worker starts, and the memory is
        theirs alone: workers of other phases have no driver either.
        """
        if not 1 <= len(jobs) <= (1 if driver else WORKERS):
            raise WorkerError(f"{self.name}: {stage}: {len(jobs)} jobs; give one to each worker")
        busy = self._workers[: len(jobs)]
        pids = [worker.pid for worker in (busy if driver else self._workers)]
        cpu = cpu_seconds(family(pids))
        with memory_of(pids, drivers=driver) as peak:
            for worker, job in zip(busy, jobs, strict=True):
                worker.send({"stage": stage, **job})
            answers = [worker.receive() for worker in busy]
        return Measured(
            seconds=max(answer["seconds"] for answer in answers),
            cpu_seconds=cpu_seconds(family(pids)) - cpu,
            pss_mb=peak.pss / 1e6,
            uss_mb=peak.uss / 1e6,
            results=[answer["result"] for answer in answers],
        )


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of processes and of the children they have waited for."""
    ticks = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Peak:
    """Largest memory seen of some processes together, in bytes."""

    pss: int = 0
    uss: int = 0


@contextmanager
def memory_of(pids: Sequence[int], *, drivers: bool = False) -> Iterator[Peak]:
    """Watch processes and all that descend from them while the block runs.

    ``drivers`` leaves the processes themselves out.
    """
    left_out = set(pids) if drivers else set()
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_S):
            look(peak, set(family(pids)) - left_out)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        look(peak, set(family(pids)) - left_out)


def look(peak: Peak, pids: Iterable[int]) -> None:
    """Take one sample of all of them together."""
    pss = uss = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has just ended
            continue
        sizes = {name: int(rest.split()[0]) << 10 for name, rest in map(_field, lines)}
        pss += sizes["Pss"]
        uss += sizes["Private_Clean"] + sizes["Private_Dirty"]
    peak.pss = max(peak.pss, pss)
    peak.uss = max(peak.uss, uss)


def _field(line: str) -> tuple[str, str]:
    name, _, rest = line.partition(":")
    return name, rest


def family(pids: Sequence[int]) -> list[int]:
    """Return processes and all that descend from them."""
    found: list[int] = []
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                waiting += map(int, children.read_text().split())
            except OSError:  # the thread has just ended
                continue
    return found


Work = Callable[[], Measured]
"""One run of one side, ready to be timed."""


def in_turn(own: Work, peer: Work, repeats: int) -> tuple[list[Measured], list[Measured]]:
    """Run both sides ``repeats`` times, the order changing from pair to pair."""
    owns: list[Measured] = []
    peers: list[Measured] = []
    for number in range(repeats):
        order = [(own, owns), (peer, peers)]
        for work, into in order if number % 2 == 0 else reversed(order):
            into.append(work())
    return owns, peers
