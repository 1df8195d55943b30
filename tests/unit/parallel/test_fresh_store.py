"""Ranks that are started again share a part of a store that the dead ones never wrote to."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from llmtrain.parallel.fresh_store import fresh_store


def started(store: Store, size: int) -> list[Store]:
    """Every rank of one start."""
    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(lambda rank: fresh_store(store, rank, size, 10.0), range(size)))


def test_every_start_has_a_part_of_its_own() -> None:
    store = HashStore()
    for size in (3, 3, 2, 1, 4):
        parts = started(store, size)
        assert not parts[0].check(["address"])
        parts[0].set("address", str(size))
        assert [part.get("address") for part in parts] == [str(size).encode()] * size


def test_a_rank_that_died_before_it_heard_leaves_nothing_behind() -> None:
    store = HashStore()
    with pytest.raises(TimeoutError, match="did not all come"):
        fresh_store(store, 1, 2, 0.05)  # nobody answers
    with pytest.raises(TimeoutError, match="did not all come"):
        fresh_store(store, 0, 2, 0.05)  # answers the dead
    parts = started(store, 2)
    parts[0].set("address", "new")
    assert parts[1].get("address") == b"new"
