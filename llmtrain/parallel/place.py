"""Which process this is among all, as its launcher says, and how processes first meet.

Invariant: here alone the launcher's variables and the allocator's are read; the configuration that
rank 0 composed reaches every rank over the rendezvous store, before any process group exists.

    place = Place.from_environment()
    config = publish_config(payload if place.rank == 0 else None)
"""

import functools
import logging
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from llmtrain.errors import ConfigError
from llmtrain.parallel.fresh_store import fresh_store

logger = logging.getLogger(__name__)

_RENDEZVOUS_TIMEOUT = timedelta(seconds=300)

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ALLOCATOR_SETTINGS = "expandable_segments:True"


class PeerLostError(RuntimeError):
    """A peer did not answer in time: it is dead or stuck, so no further collective can succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Number of this process among all, and the store through which they find each other."""

    rank: int = 0
    """Number among all processes."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number among the processes of this machine."""
    local_world_size: int = 1
    """Number of processes on this machine."""
    store: Store | None = None
    """Key-value store all processes reach; None where there is one process."""

    @classmethod
    def from_environment(cls) -> "Place":
        """Read what torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_*) gave."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        of_deepspeed = os.environ.get("LOCAL_SIZE", world_size)
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", of_deepspeed)),
            store=_rendezvous_store() if world_size > 1 else None,
        )


@functools.cache
def _rendezvous_store() -> Store:
    """Connect once per process: where rank 0 hosts the store, a second server would clash."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not {' and '.join(missing)}; "
            "start the ranks with torchrun -m llmtrain ..., or unset WORLD_SIZE for one process"
        )
    store: Store
    store, rank, size = next(iter(rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # it is rank 0's own
        return store
    try:
        return fresh_store(store, rank, size, _RENDEZVOUS_TIMEOUT.total_seconds())
    except TimeoutError as error:
        raise PeerLostError(f"rank {rank} of {size}: {error}; see the log of each") from error


def job_end() -> float | None:
    """Unix time at which Slurm ends this job, as far as it was known when the job started."""
    found = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(found) if found.isdecimal() and int(found) else None


def publish_config(payload: bytes | None) -> bytes:
    """Give every rank the bytes that rank 0 holds, before any process group exists.

    Rank 0, whose process may be the store, returns last: when it may end, nobody asks it anything.

    Args:
        payload: the bytes on rank 0, None elsewhere.

    Raises:
        PeerLostError: rank 0 published nothing, or a rank did not read, within five minutes.
    """
    place = Place.from_environment()
    if place.store is None:
        return _required(payload)
    store = PrefixStore("llmtrain/config", place.store)
    try:
        if place.rank == 0:
            content = _required(payload)
            store.set("payload", content.hex())
            store.wait([f"read/{rank}" for rank in range(1, place.world_size)], _RENDEZVOUS_TIMEOUT)
        else:
            content = bytes.fromhex(store.get("payload").decode())
            store.set(f"read/{place.rank}", "1")  # unlike add, this waits for no answer
    except dist.DistError as error:
        raise PeerLostError(
            f"rank {place.rank} lost its peers at start-up, or waited "
            f"{_RENDEZVOUS_TIMEOUT.seconds} s for them; look at the log of the missing rank "
            f"({str(error).splitlines()[0]})"
        ) from error
    return content


def grow_segments() -> None:
    """Have the CUDA allocator grow its segments, so that memory does not fall into pieces.

    Only where the user has set nothing about the allocator; before the first allocation.
    """
    found = [name for name in _ALLOCATOR_VARIABLES if name in os.environ]
    if found:
        logger.info("CUDA allocator: %s", ", ".join(f"{n}={os.environ[n]}" for n in found))
        return
    torch._C._accelerator_setAllocatorSettings(_ALLOCATOR_SETTINGS)
    logger.info(
        "CUDA allocator: %s; set %s for others", _ALLOCATOR_SETTINGS, _ALLOCATOR_VARIABLES[0]
    )


def _required(payload: bytes | None) -> bytes:
    if payload is None:
        raise ValueError("rank 0 publishes the configuration, so it must hold it")
    return payload
