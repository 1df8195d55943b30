"""What ranks compare before the first step: data, clocks, and the links between them.

The code's version and the configuration are the same on every rank already (see startup.py).

Invariant: nothing is changed, and a rank that is alone looks at nothing; it takes a fraction of a
second on any number of ranks.

    check_ranks(world, plan.fingerprint)
"""

import logging
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmtrain.errors import DataError
from llmtrain.parallel import links
from llmtrain.parallel.mesh import World

CLOCKS_APART_S = 1.0
"""Clocks that differ by more are said."""

logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What one rank tells the first."""

    host: str
    """Its machine."""
    data: str
    """Fingerprint of the batches as it would read them."""
    times: tuple[float, float]
    """Its clock, at two moments that are the same for all."""
    receive_s: float
    """Seconds it took to receive from the rank before."""


def check_ranks(
    world: World,
    data: str,
    host: str | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Compare all ranks, each of which calls it; warns on the first.

    Raises:
        DataError: on every rank, where one would read other batches.
    """
    if world.world_size == 1:
        return
    measured = links.measure(world)
    times = []
    for _ in range(2):
        world.barrier()
        times.append(clock())
    mine = Seen(host or socket.gethostname(), data, (times[0], times[1]), measured.receive_s)
    seen = world.collect(mine)
    problem = None
    if seen is not None:
        problem = _data_problem(seen)
        logger.info(
            "%d ranks sum %.3g GB/s over each link",
            world.world_size, measured.sum_bytes_per_s(world.world_size) / 1e9,
        )  # fmt: skip
        for line in (*_slow_links(seen, measured.num_bytes), *_other_clocks(seen)):
            logger.warning("%s", line)
    if (problem := world.share(problem, source=0)) is not None:
        raise DataError(problem)


def _data_problem(seen: Sequence[Seen]) -> str | None:
    others = [rank for rank, one in enumerate(seen) if one.data != seen[0].data]
    if not others:
        return None
    hosts = sorted({seen[rank].host for rank in others})
    return (
        f"ranks {', '.join(map(str, others))} on {', '.join(hosts)} read other data than rank 0 on "
        f"{seen[0].host}: {seen[others[0]].data[:12]}, expected {seen[0].data[:12]}; copy the same "
        "stores to every machine"
    )


def _slow_links(seen: Sequence[Seen], num_bytes: int) -> list[str]:
    """A sentence for every rank with a slow link."""
    found = links.outliers([(one.host, one.receive_s) for one in seen])
    return [
        f"rank {rank} on {seen[rank].host} receives {num_bytes / seen[rank].receive_s / 1e9:.3g} "
        f"GB/s from rank {(rank - 1) % len(seen)} on {seen[rank - 1].host}, {times:.0f} times less "
        "than the median of such links: look at both machines with llmtrain doctor"
        for rank, times in found
    ]


def _other_clocks(seen: Sequence[Seen]) -> list[str]:
    """A sentence for every machine whose clock is not that of most."""
    middle = [statistics.median_low(one.times[i] for one in seen) for i in range(2)]
    ahead_s = dict[str, float]()
    for one in seen:
        least = min((one.times[i] - middle[i] for i in range(2)), key=abs)
        known = ahead_s.get(one.host)
        ahead_s[one.host] = least if known is None else min(least, known, key=abs)
    return [
        f"the clock of {host} is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} the "
        f"others', more than {CLOCKS_APART_S:g} s: logs and time limits will not agree; set it by "
        "NTP (chronyc makestep)"
        for host, apart in sorted(ahead_s.items())
        if abs(apart) > CLOCKS_APART_S
    ]
