"""Where this process stands among the others: rendezvous, device, process groups, mesh.

Invariant: here alone (and in the command line) the environment is read, and here alone process
groups are made; everything else is given a ``World``. A single process makes no group at all.

    with World(config.parallel, config.engine) as world:
        print(world.rank, world.pp_rank, world.dp_rank, world.device)
"""

import functools
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from llmtrain.config.parallel import EngineConfig, ParallelConfig, resolve_dp_shard
from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)

AXES = ("pp", "dp_replicate", "dp_shard")
"""Mesh axes, the outermost (slowest link) first."""

T = TypeVar("T")

_RENDEZVOUS_TIMEOUT = timedelta(seconds=300)


class PeerLostError(RuntimeError):
    """A peer did not answer in time: it is dead or stuck, so no further collective can succeed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Ranks along each mesh axis, ``auto`` resolved."""

    pp: int
    """Pipeline stages."""
    dp_replicate: int
    """Replicas that each hold everything of their stage."""
    dp_shard: int
    """Ranks that share parameters, gradients and optimizer state."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each reads different rows."""
        return self.dp_replicate * self.dp_shard


def resolve_axes(parallel: ParallelConfig, world_size: int) -> Axes:
    """Give ``dp_shard=auto`` the ranks that the other axes leave.

    Raises:
        LayoutError: the axes do not multiply to ``world_size``.
    """
    return Axes(
        pp=parallel.pp,
        dp_replicate=parallel.dp_replicate,
        dp_shard=resolve_dp_shard(parallel, world_size),
    )


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
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
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
    store, _, _ = next(iter(rendezvous("env://", timeout=_RENDEZVOUS_TIMEOUT)))
    return store


def publish_config(payload: bytes | None) -> bytes:
    """Give every rank the bytes that rank 0 holds, before any process group exists.

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
            store.set("payload", _required(payload).hex())
        content = bytes.fromhex(store.get("payload").decode())
        if store.add("read", 1) == place.world_size:
            store.set("all_read", "1")
        store.wait(["all_read"], _RENDEZVOUS_TIMEOUT)
    except dist.DistError as error:
        raise PeerLostError(
            f"rank {place.rank} waited {_RENDEZVOUS_TIMEOUT.seconds} s for its peers at start-up; "
            "look at the log of the rank that is missing"
        ) from error
    return content


def _required(payload: bytes | None) -> bytes:
    if payload is None:
        raise ValueError("rank 0 publishes the configuration, so it must hold it")
    return payload


class World:
    """Process groups and mesh of one run; a context manager.

    On the failure path nothing collective runs: peers may be dead.
    """

    def __init__(
        self, parallel: ParallelConfig, engine: EngineConfig, place: Place | None = None
    ) -> None:
        """Settle rank, axes and device; ``place`` defaults to what the environment says.

        Raises:
            LayoutError: the axes do not fit the number of processes.
            ConfigError: there is no CUDA device for engine.device=cuda, or not one for each rank.
        """
        self.place = place or Place.from_environment()
        self.rank, self.world_size = self.place.rank, self.place.world_size
        self.axes = resolve_axes(parallel, self.world_size)
        self.device = _choose_device(engine.device, self.place)
        self.mesh: DeviceMesh | None = None
        self._engine = engine
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._control: dist.ProcessGroup | None = None

    def __enter__(self) -> Self:
        _prepare_process(self.device, self.place, self._engine.deterministic)
        if self.world_size > 1:
            self._connect()
        logger.info("rank %d of %d on %s: %s", self.rank, self.world_size, self.device, self.axes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self.mesh is not None:
            dist.destroy_process_group()
        self.mesh = self._control = None
        self._groups.clear()

    def _connect(self) -> None:
        timeout = timedelta(seconds=self._engine.timeout_s)
        on_cuda = self.device.type == "cuda"
        dist.init_process_group(
            backend="nccl" if on_cuda else "gloo",
            store=PrefixStore("llmtrain/group", self._store()),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
            device_id=self.device if on_cuda else None,
        )
        shape = (self.axes.pp, self.axes.dp_replicate, self.axes.dp_shard)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=AXES)
        for axis in AXES:
            if getattr(self.axes, axis) > 1:
                self._groups[axis] = self.mesh[axis].get_group()
        if self.axes.dp_replicate > 1 and self.axes.dp_shard > 1:
            self._groups["dp"] = self.mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        elif self.axes.dp > 1:
            self._groups["dp"] = self._groups[
                "dp_shard" if self.axes.dp_shard > 1 else "dp_replicate"
            ]
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def _store(self) -> Store:
        if self.place.store is None:
            raise ValueError(f"{self.world_size} processes need a store to find each other")
        return self.place.store

    @property
    def pp_rank(self) -> int:
        """Pipeline stage of this rank."""
        return self.rank // self.axes.dp

    @property
    def dp_rank(self) -> int:
        """Number of this rank among those that read different rows."""
        return self.rank % self.axes.dp

    @property
    def dp_size(self) -> int:
        """Number of ranks that read different rows."""
        return self.axes.dp

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head and computes the loss."""
        return self.pp_rank == self.axes.pp - 1

    @property
    def replica_rank(self) -> int:
        """Number of the replica this rank belongs to, along dp_replicate."""
        return self.dp_rank // self.axes.dp_shard

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Give the group along ``axis`` (``dp``: both data axes); None where it is 1 long."""
        return self._groups.get(axis)

    def sum(self, values: Tensor, axis: str | None = None) -> Tensor:
        """Add ``values`` in place over ``axis`` (all ranks by default); same bits everywhere."""
        group = self.group(axis) if axis is not None else None
        if self.mesh is not None and (axis is None or group is not None):
            dist.all_reduce(values, group=group)
        return values

    def broadcast(self, values: Tensor, source: int, axis: str) -> Tensor:
        """Copy ``values`` in place from the rank numbered ``source`` along ``axis``."""
        group = self.group(axis)
        if group is not None:
            dist.broadcast(values, group=group, group_src=source)
        return values

    def share(self, value: T, source: int) -> T:
        """Give every rank the small object that rank ``source`` holds, over the CPU group."""
        if self._control is None:
            return value
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=source, group=self._control)
        return box[0]

    def agree(self, flag: bool, grace_s: float = 20.0) -> bool:
        """Tell whether any rank raised ``flag``; every rank gets the same answer.

        A rank that raised it waits ``grace_s`` at most, the others the collective time-out.

        Raises:
            PeerLostError: a peer did not come; leave without saving and without a collective.
        """
        if self._control is None:
            return flag
        value = torch.tensor(int(flag), dtype=torch.int32)
        wait_s = min(grace_s, self._engine.timeout_s) if flag else self._engine.timeout_s
        try:
            work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
            work.wait(timedelta(seconds=wait_s))
        except RuntimeError as error:
            raise PeerLostError(
                f"rank {self.rank} waited {wait_s:g} s for its peers; look at the log of the rank "
                "that stopped first"
            ) from error
        return bool(value.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.agree(False)


def _choose_device(name: str, place: Place) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "engine.device=cuda, but torch sees no CUDA device; use engine.device=cpu or auto"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if found < place.local_world_size:
        raise ConfigError(
            f"{place.local_world_size} ranks on this machine need a GPU each, found {found}; start "
            f"at most {found} ranks here or use engine.device=cpu"
        )
    return torch.device("cuda", place.local_rank)


def _prepare_process(device: torch.device, place: Place, deterministic: bool) -> None:
    """Select the device, share the cores among the ranks of this machine, set determinism."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif place.local_world_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // place.local_world_size))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
