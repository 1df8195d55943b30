"""What every side of the loader benchmark answers, whichever program reads the tokens.

``start`` opens the stores and returns the first batch, timed after all imports; ``read`` takes
batches. Processor time is that of the process with all its threads and of children that ended.
Needs the standard library alone.

    answer_as(open_batches)   # open_batches(sources=..., ...) -> an endless iterator of batches
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from serve import serve

Batches = Iterator[Any]


class Side:
    """One way to read batches of windows."""

    def __init__(self, opened: Callable[..., Batches], check: Callable[[Any], list[int]]) -> None:
        """``opened`` starts a loader; ``check`` returns the shape of a batch's inputs."""
        self._open, self._check = opened, check
        self._batches: Batches | None = None

    def start(self, **arguments: Any) -> dict[str, Any]:
        """Open the stores and take the first batch."""
        self._batches = None
        gc.collect()
        with Clock() as clock:
            self._batches = self._open(**arguments)
            first = next(self._batches)
        return clock.seconds() | {"shape": self._check(first)}

    def read(self, num_batches: int) -> dict[str, Any]:
        """Take batches and drop them."""
        if self._batches is None:
            raise RuntimeError("read was asked for before start")
        with Clock() as clock:
            for _ in range(num_batches):
                next(self._batches)
        return clock.seconds()


class Clock:
    """Wall time and processor time of a block."""

    def __enter__(self) -> "Clock":
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self._wall = time.perf_counter() - self._wall
        self._cpu = _cpu_seconds() - self._cpu

    def seconds(self) -> dict[str, float]:
        """Return both."""
        return {"wall_s": self._wall, "cpu_s": self._cpu}


def answer_as(opened: Callable[..., Batches], check: Callable[[Any], list[int]]) -> None:
    """Answer requests on standard input until it ends."""
    side = Side(opened, check)
    serve({"start": side.start, "read": side.read})


def prefixes(sources: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return the path prefix of every shard and its share of the tokens."""
    found = []
    for source in sources.values():
        shards: Sequence[Sequence[Any]] = source["shards"]
        total = sum(tokens for _, tokens in shards)
        found += [(str(path), source["share"] * tokens / total) for path, tokens in shards]
    return found


def _cpu_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
