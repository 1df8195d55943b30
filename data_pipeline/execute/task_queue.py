"""A queue of tasks in a folder that driver and workers share; nothing else connects them.

A task is a file in ``open/``. A worker takes it by renaming it into ``taken/`` under its own name,
which only one of them can do, and puts what came of it into ``answers/``, whole or not at all. So
neither a worker nor the driver can die in a way that loses a task without a trace.

    queue = TaskQueue(Path("OUT/.slurm/RUN"))
    queue.put("00000007.1", function, {"x": 1})           # the driver
    serve(queue.folder, "4711_3", ServeLimits(...))       # a worker
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.execute.local import answer_within

_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0


class TaskQueue:
    """The folder, as the driver and as its workers use it."""

    def __init__(self, folder: Path) -> None:
        """Name the folder; ``create`` makes it."""
        self.folder = folder
        self._open = folder / "open"
        self._taken = folder / "taken"
        self._answers = folder / "answers"
        self._stop = folder / "stop"

    def create(self) -> None:
        """Make the folder."""
        for folder in (self._open, self._taken, self._answers):
            folder.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Offer a task under a new name; names that sort first are taken first."""
        _write(self._open / name, (function, dict(arguments)))

    def take(self, owner: str, names: Iterator[str]) -> str | None:
        """Take the first task of ``names`` that nobody else has taken; None if there is none."""
        for name in names:
            taken = self._taken / f"{name}@{owner}"
            try:
                os.rename(self._open / name, taken)
            except FileNotFoundError:
                if taken.exists():  # a file server did it twice and spoke of the second time
                    return name
                continue
            os.utime(taken)  # when it was taken, not when it was offered
            return name
        return None

    def open_names(self) -> list[str]:
        """Tasks nobody has taken, in order."""
        return sorted(name for name in os.listdir(self._open) if not name.startswith("."))

    def taken(self) -> dict[str, tuple[str, float]]:
        """Tasks without an answer: name -> (owner, when it was taken)."""
        found: dict[str, tuple[str, float]] = {}
        for entry in os.scandir(self._taken):
            name, _, owner = entry.name.partition("@")
            with suppress(FileNotFoundError):  # answered in this moment
                found[name] = owner, entry.stat().st_mtime
        return found

    def call(self, owner: str, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
        """Return what a taken task is."""
        task: tuple[Callable[..., Any], dict[str, Any]] = pickle.loads(
            (self._taken / f"{name}@{owner}").read_bytes()
        )
        return task

    def answer(self, owner: str, name: str, answer: tuple[str, Any]) -> None:
        """Hand in what came of a task."""
        _write(self._answers / name, answer)
        (self._taken / f"{name}@{owner}").unlink(missing_ok=True)

    def answers(self) -> Iterator[tuple[str, tuple[str, Any]]]:
        """Yield the answers there are, and take them away."""
        for name in sorted(os.listdir(self._answers)):
            if not name.startswith("."):
                path = self._answers / name
                content = path.read_bytes()
                path.unlink()
                yield name, pickle.loads(content)

    def withdraw(self, name: str | None = None) -> None:
        """Take back a task, or all that nobody has taken; forget who had it."""
        for path in [self._open / name] if name else list(self._open.iterdir()):
            path.unlink(missing_ok=True)
        for path in self._taken.glob(f"{name}@*") if name else ():
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        """Tell the workers to leave."""
        self._stop.touch()

    @property
    def stopped(self) -> bool:
        """Whether the workers are to leave; a folder that is gone says so too."""
        return self._stop.exists() or not self.folder.exists()


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """How long a worker serves."""

    task_s: float
    """Seconds a task may take."""
    idle_s: float
    """Seconds without a task after which it leaves."""
    total_s: float
    """Seconds its process may run."""
    folder: str
    """Folder of the driver, where relative paths begin."""

    @property
    def last_task_s(self) -> float:
        """Seconds after the start at which it may still take a task."""
        return 0.9 * self.total_s - self.task_s


def serve(folder: Path, owner: str, limits: ServeLimits) -> int:
    """Take task after task until there is none for a while; returns how many it ran.

    A worker whose job was started again hands in what it had taken before as failed.
    """
    queue = TaskQueue(folder)
    for before, (other, _) in queue.taken().items():
        if other == owner:
            queue.answer(owner, before, ("lost", f"its job {owner} was requeued by Slurm"))
    started = idle_since = time.monotonic()
    served, pause = 0, _SHORTEST_PAUSE
    names: Iterator[str] = iter(())
    while not queue.stopped and time.monotonic() - started < limits.last_task_s:
        name = queue.take(owner, names)
        if name is None:
            names = iter(queue.open_names())
            name = queue.take(owner, names)
        if name is None:
            if time.monotonic() - idle_since >= limits.idle_s:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        function, arguments = queue.call(owner, name)
        answer = answer_within(limits.task_s, limits.folder, function, arguments)
        queue.answer(owner, name, answer)
        served, pause, idle_since = served + 1, _SHORTEST_PAUSE, time.monotonic()
    return served


def _write(path: Path, value: object) -> None:
    """Write a file that is either whole or not there under its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(pickle.dumps(value))
        os.rename(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
