"""Python objects over the ranks of a run, and the same calls where there is one process alone.

Invariant: what raises on the first rank raises on every rank, so that none waits for another.

    found = from_first_rank(lambda: newest_good(folder))
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from llmtrain.errors import CheckpointError

T = TypeVar("T")


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
