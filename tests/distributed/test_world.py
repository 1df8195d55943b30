"""Ranks find each other, agree, and a dead or stuck peer is noticed in time."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.errors import LayoutError
from llmtrain.parallel import place as module
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import PeerLostError, Place, publish_config
from tests.ports import free_ports
from tests.world import RankPool, RankTimeoutError

ONE_MINUTE = timedelta(minutes=1)
TWO = ParallelConfig(dp_replicate=2, dp_shard=1)


def engine(timeout_s: float = 60.0) -> EngineConfig:
    return EngineConfig(device="cpu", timeout_s=timeout_s)


def coordinates(place: Place) -> tuple[tuple[int, ...], dict[str, list[int] | None]]:
    """Numbers along the axes, and the ranks of every group this rank is in."""
    import torch.distributed as dist

    parallel = ParallelConfig(pp=2, dp_shard=2, cp=1, tp=2)
    with World(parallel, engine(), place) as world:
        world.join_ends(0, 1)
        numbers = (world.pp_rank, world.dp_rank, world.cp_rank, world.tp_rank)
        names = [*world.axes.groups(), "ends"]
        groups = {name: world.group(name) for name in names}
        return numbers, {
            name: None if group is None else dist.get_process_group_ranks(group)
            for name, group in groups.items()
        }


def test_every_rank_knows_its_place_and_its_groups(ranks: RankPool) -> None:
    found = ranks.run(coordinates, size=8)
    assert [numbers for numbers, _ in found] == [
        (pp, dp, 0, tp) for pp in (0, 1) for dp in (0, 1) for tp in (0, 1)
    ]
    assert found[5][1] == {
        "pp": [1, 5], "dp_replicate": None, "dp_shard": [5, 7], "cp": None, "tp": [4, 5],
        "dp": [5, 7], "shard": [5, 7], "replicas": None, "stage": [4, 5, 6, 7], "ends": [1, 5],
    }  # fmt: skip


def test_one_process_needs_no_group() -> None:
    import torch.distributed as dist

    with World(ParallelConfig(), engine(), Place()) as world:
        assert not dist.is_initialized()
        assert world.group("dp") is None
        assert world.agree(True)
        assert not world.agree(False)
        assert world.share("value", source=0) == "value"


def test_axes_must_make_the_world() -> None:
    with pytest.raises(LayoutError, match="pp=2"):
        World(ParallelConfig(pp=2), engine(), Place())


def vote(place: Place) -> list[bool]:
    with World(TWO, engine(), place) as world:
        return [world.agree(False), world.agree(place.rank == 1), world.agree(False)]


def test_one_vote_is_enough(ranks: RankPool) -> None:
    assert ranks.run(vote, size=2) == [[False, True, False]] * 2


def lose_a_peer(place: Place) -> float:
    """Rank 1 never comes; rank 0, asked to stop, notices within its grace."""
    start = time.monotonic()
    with World(TWO, engine(), place) as world:
        if place.rank == 1:
            time.sleep(3.0)
            return 0.0
        try:
            world.agree(True, grace_s=1.0)
        except PeerLostError:
            return time.monotonic() - start
    return -1.0


def test_lost_peer_is_noticed_within_the_grace(ranks: RankPool) -> None:
    waited = ranks.run(lose_a_peer, size=2)[0]

    assert 1.0 <= waited < 3.0


def rendezvous_at(place: Place, port: int) -> None:
    """Set the usual variables, as a launcher does; forget the store of an earlier test."""
    module._rendezvous_store.cache_clear()
    os.environ.update(
        RANK=str(place.rank), WORLD_SIZE=str(place.world_size), LOCAL_RANK=str(place.rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def published(place: Place, port: int) -> bytes:
    rendezvous_at(place, port)
    content = publish_config(b"\x00config\xff" if place.rank == 0 else None)
    with World(TWO, engine()) as world:
        assert world.agree(world.rank == 0)
    return content


@pytest.fixture(scope="module")
def launched() -> Iterator[RankPool]:
    """Ranks whose environment the tests may change."""
    with RankPool() as pool:
        yield pool


def test_configuration_reaches_every_rank_before_groups_exist(launched: RankPool) -> None:
    assert launched.run(published, *free_ports(1), size=2) == [b"\x00config\xff"] * 2


class SlowStore(PrefixStore):
    """Every request of this rank comes late."""

    def get(self, key: str) -> bytes:
        time.sleep(0.2)
        return super().get(key)

    def set(self, key: str, value: str) -> None:
        time.sleep(0.2)
        super().set(key, value)

    def add(self, key: str, amount: int) -> int:
        time.sleep(0.2)
        return super().add(key, amount)

    def wait(self, keys: list[str], timeout: timedelta = ONE_MINUTE) -> None:
        time.sleep(0.2)
        super().wait(keys, timeout)


def published_and_left(place: Place, port: int) -> bytes:
    """The store goes with rank 0, as where the run turns out to be done; rank 1 is slow."""
    rendezvous_at(place, port)
    module.PrefixStore = SlowStore if place.rank == 1 else PrefixStore
    content = publish_config(b"done" if place.rank == 0 else None)
    module._rendezvous_store.cache_clear()
    return content


def test_rank_0_may_leave_once_it_has_published(launched: RankPool) -> None:
    assert launched.run(published_and_left, *free_ports(1), size=2) == [b"done"] * 2


def hang(place: Place) -> None:
    if place.rank == 1:
        time.sleep(600)


def test_stuck_rank_is_killed_and_the_pool_lives_on() -> None:
    with RankPool() as pool:
        assert len(pool.run(pid, size=2)) == 2
        first = pool.pids
        with pytest.raises(RankTimeoutError, match=r"ranks \[1\] of 2"):
            pool.run(hang, size=2, timeout_s=1.0)
        assert not any(alive(number) for number in first if number)
        assert set(pool.run(pid, size=1)).isdisjoint(first)


def pid(place: Place) -> int:
    return os.getpid()


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True
