"""The mesh of all ranks: axes, device, process groups along each set of axes.

Invariant: here alone process groups are made; everything else is given a ``World``. A single
process makes no group, but one of its own for DeepSpeed.

    with World(config.parallel, config.engine) as world:
        print(world.rank, world.pp_rank, world.dp_rank, world.device)
"""

import logging
import math
import os
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig, resolve_dp
from llmtrain.errors import ConfigError
from llmtrain.hang.heartbeat import Heartbeat
from llmtrain.parallel.place import PeerLostError, Place, grow_segments
from llmtrain.parallel.scopes import COMMUNICATION, scope

logger = logging.getLogger(__name__)

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh axes, the outermost (slowest link) first."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Ranks along each mesh axis, ``auto`` resolved."""

    pp: int = 1
    """Pipeline ranks."""
    dp_replicate: int = 1
    """Replicas that each hold everything of their stage."""
    dp_shard: int = 1
    """Ranks that share parameters, gradients and optimizer state."""
    cp: int = 1
    """Ranks that each hold a part of every sequence."""
    tp: int = 1
    """Ranks that each hold a part of every matrix."""

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each reads different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def shape(self) -> tuple[int, ...]:
        """Ranks along each of AXES."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Name the sets of axes along which ranks talk to each other."""
        sharded = self.dp_shard > 1
        return {
            **{axis: (axis,) for axis in AXES},
            "dp": ("dp_replicate", "dp_shard"),
            "shard": ("dp_shard", "cp") if sharded else (),
            "replicas": ("dp_replicate",) if sharded else ("dp_replicate", "cp"),
            "stage": ("dp_replicate", "dp_shard", "cp", "tp"),
        }


def resolve_axes(parallel: ParallelConfig, world_size: int) -> Axes:
    """Give ``auto`` the ranks that the other axes leave.

    Raises:
        LayoutError: the axes do not multiply to ``world_size``.
    """
    replicate, shard = resolve_dp(parallel, world_size)
    return Axes(
        pp=parallel.pp,
        dp_replicate=replicate,
        dp_shard=shard,
        cp=parallel.cp,
        tp=parallel.tp,
    )


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
        self._place_of = dict(zip(AXES, _coordinates(self.rank, self.axes.shape), strict=True))
        self._engine = engine
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._sets: dict[str, list[list[int]]] = {}
        self._control: dist.ProcessGroup | None = None
        self.beat = Heartbeat()
        """Where this rank is; private until train/watchdog.py opens it."""

    def __enter__(self) -> Self:
        _prepare_process(self.device, self.place, self._engine.deterministic)
        if self._engine.kind == "deepspeed":
            # It asks the environment for both, and was perhaps not started by its own launcher.
            os.environ["LOCAL_RANK"] = str(self.place.local_rank)
            os.environ["DS_ACCELERATOR"] = self.device.type
        if self.world_size > 1 or self._engine.kind == "deepspeed":  # which wants a group of one
            self._connect()
        here = (self.rank, self.world_size, self.device, self._engine.kind, self.axes)
        logger.info("rank %d of %d on %s, engine.kind=%s: %s", *here)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._control is not None:
            self._part()
        self._control = None
        self._groups.clear()
        self._sets.clear()

    def _part(self) -> None:
        """Leave together: a rank that is gone would fail peers that are still connecting to it."""
        try:
            self.agree(True)
        except PeerLostError:
            logger.warning("rank %d leaves before its peers", self.rank)
        dist.destroy_process_group()

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
        for name, axes in self.axes.groups().items():
            self._add_group(name, self._ranks_along(axes))
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def _ranks_along(self, axes: tuple[str, ...]) -> list[list[int]]:
        """Cut all ranks into sets that differ along ``axes`` only, each in rank order."""
        kept = [AXES.index(axis) for axis in axes]
        others = [index for index in range(len(AXES)) if index not in kept]
        grid = torch.arange(self.world_size).view(self.axes.shape).permute(*others, *kept)
        size = math.prod(self.axes.shape[index] for index in kept)
        sets: list[list[int]] = grid.reshape(-1, size).tolist()
        return sets

    def _add_group(self, name: str, sets: list[list[int]]) -> None:
        """Make the group of this rank, once for equal sets of ranks; every rank calls it alike.

        A rank in none of the sets gets no such group.
        """
        if len(sets[0]) == 1:
            return
        known = next((other for other, same in self._sets.items() if same == sets), None)
        if known is not None:
            group = self._groups.get(known)
        elif sets == [list(range(self.world_size))]:
            group = dist.group.WORLD
        else:
            timeout = timedelta(seconds=self._engine.timeout_s)
            make: Any = dist.new_subgroups_by_enumeration
            group, _ = make(sets, timeout=timeout)
        self._sets[name] = sets
        if group is not None:
            self._groups[name] = group

    def join_ends(self, first: int, last: int) -> None:
        """Make the group ``ends`` of the pipeline ranks that hold the first and the last stage.

        Every rank calls it alike; ranks of other stages have no such group.
        """
        if first != last:
            rows = self._ranks_along(("pp",))
            self._add_group("ends", [[ranks[first], ranks[last]] for ranks in rows])

    def shard_mesh(self) -> DeviceMesh:
        """Give the mesh FSDP2 shards over: [dp_replicate, dp_shard x cp], or the latter alone.

        Raises:
            ValueError: dp_shard is 1.
        """
        shard = self.group("shard")
        if shard is None:
            raise ValueError("nothing is sharded: dp_shard is 1")
        kind = self.device.type
        replicate = self.group("dp_replicate")
        if replicate is None:
            return DeviceMesh.from_group(shard, kind, mesh_dim_names=("dp_shard",))
        ranks = next(
            ranks for ranks in self._ranks_along(("dp_replicate", "dp_shard", "cp"))
            if self.rank in ranks
        )  # fmt: skip
        return DeviceMesh.from_group(
            [replicate, shard],
            kind,
            mesh=torch.tensor(ranks).view(self.axes.dp_replicate, -1),
            mesh_dim_names=("dp_replicate", "dp_shard"),
        )

    def _store(self) -> Store:
        if self.place.store is not None:
            return self.place.store
        if self.world_size > 1:
            raise ValueError(f"{self.world_size} processes need a store to find each other")
        return HashStore()

    @property
    def pp_rank(self) -> int:
        """Number of this rank along pp."""
        return self._place_of["pp"]

    @property
    def dp_rank(self) -> int:
        """Number of this rank among those that read different rows."""
        return self._place_of["dp_replicate"] * self.axes.dp_shard + self._place_of["dp_shard"]

    @property
    def dp_size(self) -> int:
        """Number of ranks that read different rows."""
        return self.axes.dp

    @property
    def cp_rank(self) -> int:
        """Number of this rank along cp."""
        return self._place_of["cp"]

    @property
    def tp_rank(self) -> int:
        """Number of this rank along tp."""
        return self._place_of["tp"]

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank counts among those that hold the same parameters for other rows."""
        return all(self._place_of[axis] == 0 for axis in self.axes.groups()["replicas"])

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Give the group along an axis or a set of axes (see Axes.groups); None where 1 long."""
        return self._groups.get(axis)

    def sum(self, values: Tensor, axis: str | None = None) -> Tensor:
        """Add ``values`` in place over ``axis`` (all ranks by default); same bits everywhere."""
        group = self.group(axis) if axis is not None else None
        if self._control is not None and (axis is None or group is not None):
            with self.beat.waiting, scope(COMMUNICATION):
                dist.all_reduce(values, group=group)
        return values

    def share(self, value: T, source: int) -> T:
        """Give every rank the small object that rank ``source`` holds, over the CPU group."""
        if self._control is None:
            return value
        box: list[T] = [value]
        with self.beat.waiting:
            dist.broadcast_object_list(box, src=source, group=self._control)
        return box[0]

    def collect(self, value: T) -> list[T] | None:
        """Give rank 0 the small objects of all ranks, in their order; None elsewhere."""
        if self._control is None:
            return [value]
        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        with self.beat.waiting:
            dist.gather_object(value, found, dst=0, group=self._control)
        return found

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
            with self.beat.waiting, scope(COMMUNICATION):
                work = dist.all_reduce(
                    value, op=dist.ReduceOp.MAX, group=self._control, async_op=True
                )
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


def _coordinates(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Place ``rank`` in a grid whose last axis changes fastest."""
    coordinates = []
    for size in reversed(shape):
        rank, coordinate = divmod(rank, size)
        coordinates.append(coordinate)
    return tuple(reversed(coordinates))


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
        grow_segments()
    elif place.local_world_size > 1 or "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, (cores or 1) // place.local_world_size))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
