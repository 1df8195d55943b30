"""A pool of live processes that run a function as ranks of a small gloo world.

Starting Python and importing torch costs seconds, a process group over a FileStore some hundredths:
so the processes stay alive between calls, and every call makes and ends its own groups through
the same ``World`` as a real run. A call that outlasts its time limit kills all ranks; the next
call starts fresh ones.

    with RankPool() as pool:
        results = pool.run(body, argument, size=2)   # body(place, argument) on ranks 0 and 1
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_SPAWN = multiprocessing.get_context("spawn")


class RankError(AssertionError):
    """A rank raised; holds its traceback."""


class RankTimeoutError(AssertionError):
    """Ranks did not answer in time; they were killed."""


class RankPool:
    """Up to four ranks, started when first needed."""

    def __init__(self) -> None:
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def pids(self) -> list[int | None]:
        """Process ids of the live ranks."""
        return [process.pid for process, _ in self._ranks]

    def run(
        self, body: Callable[..., Any], *arguments: Any, size: int, timeout_s: float = 120.0
    ) -> list[Any]:
        """Run ``body(place, *arguments)`` on ranks 0 to size - 1; return their results in order.

        ``body`` must be importable by name. Raises RankError with the traceback of the first rank
        that raised, RankTimeoutError with the ranks that were not done.
        """
        self._start(size)
        self._calls += 1
        store = str(Path(self._folder.name) / f"store-{self._calls}")
        for rank, (_, pipe) in enumerate(self._ranks[:size]):
            pipe.send((body, rank, size, store, arguments))
        return self._collect(size, time.monotonic() + timeout_s)

    def _start(self, size: int) -> None:
        while len(self._ranks) < size:
            ours, theirs = _SPAWN.Pipe()
            process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _collect(self, size: int, deadline: float) -> list[Any]:
        answers: dict[int, Any] = {}
        while len(answers) < size:
            for rank in set(range(size)) - set(answers):
                pipe = self._ranks[rank][1]
                if not pipe.poll(0.002):
                    continue
                try:
                    failed, value = pipe.recv()
                except EOFError:
                    failed, value = True, "the process died"
                if failed:
                    self.kill()
                    raise RankError(f"rank {rank} of {size}:\n{value}")
                answers[rank] = value
            if time.monotonic() > deadline:
                self.kill()
                behind = sorted(set(range(size)) - set(answers))
                raise RankTimeoutError(f"ranks {behind} of {size} did not answer in time")
        return [answers[rank] for rank in range(size)]

    def kill(self) -> None:
        """End every rank now."""
        for process, pipe in self._ranks:
            process.kill()
            process.join()
            pipe.close()
        self._ranks.clear()


def _serve(pipe: Connection) -> None:
    """Answer calls until the pipe closes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from torch.distributed import FileStore

    from llmtrain.parallel.mesh import Place

    torch.set_num_threads(1)
    while True:
        try:
            body, rank, size, path, arguments = pipe.recv()
        except EOFError:
            return
        try:
            store = FileStore(path, size) if size > 1 else None
            place = Place(
                rank=rank, world_size=size, local_rank=rank, local_world_size=size, store=store
            )
            pipe.send((False, body(place, *arguments)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
