"""Python objects over the ranks of a run, and the same calls where there is one process alone.

Invariant: what raises on the first rank raises on every rank, so that none waits for another.

    found = from_first_rank(lambda: newest_good(folder))
    digests = together(lambda: hash_all(mine), lambda: tally.num_bytes, beat)   # for hours
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from llmtrain.errors import CheckpointError

T = TypeVar("T")

PAUSE_S = 1.0
"""Seconds from one meeting of ranks that work on something long to the next."""
STILL_S = 600.0
"""Seconds in which none of them may move."""


def rank() -> int:
    """This process among all; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """``value`` of every rank, on every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(compute: Callable[[], T]) -> T:
    """Compute on rank 0 and give the value, or its CheckpointError, to every rank."""
    box: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box[0] = compute()
        except CheckpointError as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    value, problem = box
    if problem is not None:
        raise CheckpointError(problem)
    result: T = value
    return result


def together(work: Callable[[], T], moved: Callable[[], Any], beat: Callable[[], None]) -> list[T]:
    """What ``work`` gives on every rank, in rank order, however long it takes.

    It runs in a thread. Meanwhile the ranks meet in short collectives, so that the time-out of none
    is that of the work, and ``beat`` as long as what ``moved`` tells changes on any of them.
    Raises CheckpointError on every rank alike; RuntimeError where another rank fails otherwise;
    TimeoutError where nothing moves.
    """
    if not dist.is_initialized():
        return [work()]
    future = _begun(work)
    told: list[Any] = []
    still = 0
    while True:
        wait([future], PAUSE_S)
        before, told = told, gather((future.done(), moved()))
        if all(done for done, _ in told):
            return _outcomes(future)
        still = still + 1 if told == before else 0
        if not still:
            beat()
        elif still * PAUSE_S > STILL_S:
            late = [number for number, (done, _) in enumerate(told) if not done]
            raise TimeoutError(
                f"ranks {late} have read nothing for {STILL_S:g} s; look at the disk"
            )


def _begun(work: Callable[[], T]) -> Future[T]:
    """Begin ``work`` in a thread that no end of the process waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="together", daemon=True).start()
    return future


def _outcomes(future: Future[T]) -> list[T]:
    """What every rank has come to, of whom none raises alone."""
    error = future.exception()
    refused = str(error) if isinstance(error, CheckpointError) else None
    other = None if error is None else f"{type(error).__name__}: {error}"
    values = gather((None if error else future.result(), refused, other))
    for number, (_, problem, fault) in enumerate(values):
        if fault is not None and problem is None:
            raise error or RuntimeError(f"rank {number}: {fault}")
    for _, problem, _ in values:
        if problem is not None:
            raise CheckpointError(problem)
    found: list[Any] = [value for value, _, _ in values]
    return found


def gather_at_first(value: T) -> list[T] | None:
    """``value`` of every rank on the first, in rank order; None on the others."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def scatter(values: list[T] | None) -> T:
    """Give every rank its own of the values that the first holds."""
    if values is not None and not dist.is_initialized():
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, values, src=0)
    found: T = box[0]
    return found


def share(value: T) -> T:
    """The first rank's ``value``, on every rank."""
    return from_first_rank(lambda: value)


@contextmanager
def one_process_is_fine() -> Iterator[None]:
    """Silence torch's warning that a run of one process has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
