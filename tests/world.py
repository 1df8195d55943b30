"""Pools of live processes that run a function as ranks of a small gloo world.

Importing torch costs seconds, DeepSpeed some more, a process group over a FileStore hundredths. So
one process per set of imports has them done and forks the ranks; these stay alive between calls,
and every call makes and ends its own groups through the same ``World`` as a real run. A rank that
raises or a call that outlasts its time limit ends all ranks of the pool; the next call forks fresh
ones.

    with RankPool() as pool:
        results = pool.run(body, argument, size=2)   # body(place, argument) on ranks 0 and 1
"""

import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_SPAWN = multiprocessing.get_context("spawn")

NATIVE = (
    "llmtrain.cli", "llmtrain.prepare", "llmtrain.build", "llmtrain.engine.native",
    "llmtrain.parallel.apply", "llmtrain.parallel.pipeline", "torch.distributed.checkpoint",
    "hydra",
)  # fmt: skip
"""What ranks of the native engine import, and what the commands of a run do."""
DEEPSPEED = (
    *NATIVE,
    "deepspeed",
    "llmtrain.engine.deepspeed",
    "llmtrain.engine.deepspeed.pipeline",
)
"""What ranks of DeepSpeed's engine import."""
DEEPSPEED_ENVIRONMENT = (("DS_ACCELERATOR", "cpu"),)
"""What its ranks find in the environment."""


class RankError(AssertionError):
    """A rank raised; holds its traceback."""


class RankTimeoutError(AssertionError):
    """Ranks did not answer in time; they were killed."""


@dataclass
class _Rank:
    """A live rank: its process id and the pipe to it."""

    pid: int
    pipe: Connection


class RankPool:
    """As many ranks as a call asks for, started when first needed."""

    def __init__(
        self, preload: tuple[str, ...] = NATIVE, environment: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Ranks with the modules ``preload`` imported under extra environment variables."""
        self._kind = (preload, environment)
        self._ranks: list[_Rank] = []
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
    def pids(self) -> list[int]:
        """Process ids of the live ranks."""
        return [rank.pid for rank in self._ranks]

    def run(
        self, body: Callable[..., Any], *arguments: Any, size: int, timeout_s: float = 120.0
    ) -> list[Any]:
        """Run ``body(place, *arguments)`` on ranks 0 to size - 1; return their results in order.

        ``body`` must be importable by name. Raises RankError with the traceback of the first rank
        that raised, RankTimeoutError with the ranks that were not done.
        """
        while len(self._ranks) < size:
            self._ranks.append(_parent(*self._kind).fork())
        self._calls += 1
        store = str(Path(self._folder.name) / f"store-{self._calls}")
        for rank, live in enumerate(self._ranks[:size]):
            live.pipe.send((body, rank, size, store, arguments))
        return self._collect(size, time.monotonic() + timeout_s)

    def _collect(self, size: int, deadline: float) -> list[Any]:
        waiting = {rank.pipe: number for number, rank in enumerate(self._ranks[:size])}
        answers: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                behind = sorted(waiting.values())
                raise RankTimeoutError(f"ranks {behind} of {size} did not answer in time")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    failed, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    failed, value = True, "the process died"
                if failed:
                    self.kill()
                    raise RankError(f"rank {rank} of {size}:\n{value}")
                answers[rank] = value
        return [answers[rank] for rank in range(size)]

    def strike(self) -> None:
        """End every rank now, from any thread: one that is in ``run`` meets their end there."""
        for pid in self.pids:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """End every rank now, in the thread that runs on them."""
        self.strike()
        for rank in self._ranks:
            _await_end(rank.pid)
            rank.pipe.close()
        self._ranks.clear()


def _await_end(pid: int) -> None:
    """Wait until the process that forked ``pid`` has taken note of its end."""
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.001)


class _Parent:
    """A process that has imported what ranks need, and forks them."""

    def __init__(self, preload: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_fork_ranks, args=(theirs, preload, dict(environment)))
        process.daemon = True  # ended with this process; its own end ends the ranks
        process.start()
        theirs.close()

    def fork(self) -> _Rank:
        """A new rank."""
        ours, theirs = _SPAWN.Pipe()
        try:
            self._pipe.send(theirs)
            pid: int = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RankError("the process that forks ranks has ended; see its traceback") from error
        theirs.close()
        return _Rank(pid, ours)


def fork_rank(deepspeed: bool = False) -> _Rank:
    """A process of an engine's kind, for who drives it alone; killed by who made it."""
    return _parent(*((DEEPSPEED, DEEPSPEED_ENVIRONMENT) if deepspeed else (NATIVE, ()))).fork()


@functools.cache
def _parent(preload: tuple[str, ...], environment: tuple[tuple[str, str], ...]) -> _Parent:
    return _Parent(preload, dict(environment))


def _fork_ranks(pipe: Connection, preload: tuple[str, ...], environment: dict[str, str]) -> None:
    """Import, then fork a rank for every pipe that arrives; leave when nobody sends any more."""
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    import torch

    torch.set_num_threads(1)
    for name in preload:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries ranks that were killed
    while True:
        try:
            theirs = pipe.recv()
        except EOFError:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pipe.close()
            _serve(theirs)
            os._exit(0)
        theirs.close()
        pipe.send(pid)


def _serve(pipe: Connection) -> None:
    """Answer calls until the pipe closes."""
    from torch.distributed import FileStore

    from llmtrain.parallel.place import Place

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
            answer = pickle.dumps((False, body(place, *arguments)))
        except BaseException:
            answer = pickle.dumps((True, traceback.format_exc()))
        pipe.send_bytes(answer)  # send() would keep a file open for every tensor
