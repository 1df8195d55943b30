"""A quick look at the links between ranks: how fast they sum, and whether one of them is slow.

All ranks sum a few megabytes, then every rank receives as many from the rank before it, all at the
same time: a node with a bad cable or a card in the wrong slot shows in its own number, where in a
sum all would wait for it alike.

    links = measure(world)      # every rank; seconds of the sum, and of what this rank received
    slow = outliers([("n0", 0.01), ("n0", 0.01), ("n1", 0.09)])
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.parallel.mesh import World

CPU_BYTES, GPU_BYTES = 1 << 20, 1 << 25
"""Bytes that travel each time."""
ROUNDS = 3
"""The fastest counts, after one that only connects."""
SLOW = 5.0
"""Times the median of links of its kind at which one is slow."""


@dataclass(frozen=True, slots=True)
class Links:
    """What a rank has measured."""

    num_bytes: int
    """Bytes of every exchange."""
    sum_s: float
    """Seconds of a sum over all ranks."""
    receive_s: float
    """Seconds in which this rank received from the one before it and sent to the one behind."""

    def sum_bytes_per_s(self, world_size: int) -> float:
        """Bytes a ring of ``world_size`` ranks moves over each link for a sum, by second."""
        return 2 * (world_size - 1) / world_size * self.num_bytes / self.sum_s


def measure(world: World) -> Links:
    """Time both exchanges; every rank calls it alike, and there are at least two."""
    on_gpu = world.device.type == "cuda"
    num_bytes = GPU_BYTES if on_gpu else CPU_BYTES
    values = torch.zeros(num_bytes // 4, device=world.device)
    arrived = torch.empty_like(values)

    def total() -> None:
        world.sum(values)

    def shift() -> None:
        _shift(values, arrived, world.rank, world.world_size)

    found = []
    for exchange in (total, shift):
        exchange()
        found.append(min(_seconds(exchange, world) for _ in range(ROUNDS)))
    return Links(num_bytes, *found)


def outliers(received: Sequence[tuple[str, float]]) -> list[tuple[int, float]]:
    """Ranks whose link from the rank before is slow, with how many times the median it takes.

    Args:
        received: host and seconds of every rank; links within a host and between two are apart.
    """
    across = [host != received[rank - 1][0] for rank, (host, _) in enumerate(received)]
    found = []
    for kind in (False, True):
        ranks = [rank for rank, crosses in enumerate(across) if crosses is kind]
        if len(ranks) < 3:
            continue
        median = statistics.median(received[rank][1] for rank in ranks)
        found += [
            (rank, received[rank][1] / median)
            for rank in ranks
            if received[rank][1] > SLOW * median
        ]
    return sorted(found)


def _shift(values: Tensor, arrived: Tensor, rank: int, world_size: int) -> None:
    exchanges = [
        dist.P2POp(dist.isend, values, (rank + 1) % world_size),
        dist.P2POp(dist.irecv, arrived, (rank - 1) % world_size),
    ]
    for work in dist.batch_isend_irecv(exchanges):
        work.wait()


def _seconds(exchange: Callable[[], None], world: World) -> float:
    world.barrier()
    started = time.perf_counter()
    exchange()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - started
