"""Starts the ranks of a small world on this machine, for commands that need one for a moment.

Invariant: no port is opened: the ranks meet over a file; if one fails, the others are ended and the
failure is raised here.

    run_ranks(function, 2, folder / "store", argument)    # function(place, argument) on two ranks
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import spawn

from llmtrain.parallel.place import Place


def run_ranks(function: Callable[..., None], size: int, store: Path, *arguments: Any) -> None:
    """Run ``function(place, *arguments)`` as ranks 0 to size - 1 and wait for all.

    Args:
        function: importable by name.
        size: number of processes.
        store: file through which the ranks meet; must not exist.
        arguments: picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; holds its traceback.
    """
    spawn(  # type: ignore[no-untyped-call]
        _start, args=(function, size, str(store), arguments), nprocs=size, join=True
    )


def _start(
    rank: int, function: Callable[..., None], size: int, store: str, arguments: tuple[Any, ...]
) -> None:
    place = Place(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        store=FileStore(store, size),
    )
    function(place, *arguments)
