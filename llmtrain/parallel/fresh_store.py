"""A part of the rendezvous store that the processes of one start share, and none before them.

Torchrun's store outlives the ranks it starts again, so that a rank could read addresses that dead
ones left. Rank 0 names the part; it answers what every rank has newly said, and waits for all.

Invariant: a rank believes no name that does not answer its own words.

    store = fresh_store(store, rank=0, world_size=2, timeout_s=300.0)
"""

import json
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

_LOOK_S = 0.01


def fresh_store(store: Store, rank: int, world_size: int, timeout_s: float) -> Store:
    """The part of ``store`` for the processes that call this together, one for every rank.

    Raises:
        TimeoutError: a rank did not come in time.
    """
    meeting, own = PrefixStore("llmtrain/start", store), uuid4().hex
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        name = own
        _gather(meeting, name, range(1, world_size), deadline)
    else:
        meeting.set(f"word/{rank}", own)
        name = _answered(meeting, rank, own, deadline)
        meeting.set(f"heard/{rank}", name)
    return PrefixStore(f"llmtrain/{name}", store)


def _gather(store: Store, name: str, ranks: Sequence[int], deadline: float) -> None:
    """Answer the words of all ranks, anew where they change, until every rank has heard."""
    words, heard = ([f"{what}/{rank}" for rank in ranks] for what in ("word", "heard"))
    answered: list[str] | None = None
    while True:
        if (said := _read(store, words)) is not None and said != answered:
            answered = said
            store.set(
                "answer", json.dumps({"name": name, "words": dict(zip(words, said, strict=True))})
            )
        if _read(store, heard) == [name] * len(heard):
            return
        _pause(deadline)


def _answered(store: Store, rank: int, own: str, deadline: float) -> str:
    """Wait for an answer to this rank's word; returns the name in it."""
    while True:
        found = _read(store, ["answer"])
        answer: dict[str, Any] = {"words": {}} if found is None else json.loads(found[0])
        if answer["words"].get(f"word/{rank}") == own:
            return str(answer["name"])
        _pause(deadline)


def _read(store: Store, keys: Sequence[str]) -> list[str] | None:
    """What stands under all of ``keys``, None where one is missing."""
    if not keys:
        return []
    if not store.check(list(keys)):
        return None
    return [value.decode() for value in store.multi_get(list(keys))]


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("the ranks of this start did not all come to the rendezvous store")
    time.sleep(_LOOK_S)
