"""Functions of whole matrices whose regions lie on many ranks, as Muon's update needs them.

Each matrix has one owner among all ranks of the pipeline stage, replicas included, chosen so that
the work is spread evenly. Regions travel to the owner, the function runs there once, on all the
matrices that arrived together, and the regions of its results travel back to everyone who holds
them.

Invariant: the function sees the matrices that one process would see, only fewer at a time: where it
treats each alone, results have the same bits on every layout. Exchanges are all-to-alls of many
matrices each, in an order that all ranks work out alike.

    run = matrix_map(local.parameters, world)
    updates = run(orthogonalize_all, {"model.layers.0.mlp.up_proj.weight": local_part, ...})
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.model.parameters import ParameterInfo
from llmtrain.parallel.mesh import World
from llmtrain.parallel.region import Region, sizes

MatrixFunction = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A function of whole matrices that keeps their number and shapes."""

MatrixMap = Callable[[MatrixFunction, Mapping[str, Tensor]], dict[str, Tensor]]
"""Applies a function to whole matrices, given and returned as local parts by parameter name.

Collective: all ranks of a pipeline stage call it with the same names, in the same order.
"""

ROUND_BYTES = 64 * 2**20
"""Matrices of one owner in one exchange, at least one matrix."""

Bounds = tuple[tuple[int, int], ...]
"""A region as (start, stop) for each dim: unlike slices, it can be a key."""


class HeldParameter(Protocol):
    """What the map asks of a parameter; ``parallel.local.OwnedParameter`` has it."""

    @property
    def info(self) -> ParameterInfo:
        """Its row in the parameter table."""

    @property
    def region(self) -> Region:
        """Where this rank's part lies in the whole."""


def matrix_map(owned: Sequence[HeldParameter], world: World) -> MatrixMap:
    """Make the map of the matrices among ``owned``; all ranks of a pipeline stage call it.

    Raises:
        ValueError: the regions that the ranks hold do not make up a whole matrix.
    """
    group = world.group("stage")
    if group is None:
        return run_alone
    return MatrixExchange(owned, group, world.device)


def run_alone(function: MatrixFunction, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply ``function`` where every matrix is whole: the map of one process."""
    return dict(zip(values, function(list(values.values())), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Who holds what of one matrix."""

    name: str
    """Of its parameter."""
    shape: tuple[int, ...]
    """Of the whole."""
    holders: Mapping[Bounds, tuple[int, ...]]
    """Ranks of the group that hold each region, in rank order; regions in their own order."""

    @property
    def cost(self) -> int:
        """Work of orthogonalising it, up to a factor (multiplications of one iteration)."""
        small, large = sorted(self.shape)
        return small * small * (2 * large + small)


@dataclass(frozen=True, slots=True)
class Transfer:
    """One region of one matrix on its way between two ranks of the group."""

    name: str
    """Of the parameter."""
    bounds: Bounds
    """Which region."""
    source: int
    """Rank that has it."""
    target: int
    """Rank that needs it."""


@dataclass(frozen=True, slots=True)
class Round:
    """Matrices that travel together."""

    names: tuple[str, ...]
    """Matrices of this rank, to run the function on."""
    gather: tuple[Transfer, ...]
    """Regions to the owners, of all ranks."""
    scatter: tuple[Transfer, ...]
    """Regions of the results to all holders."""


Arrived = Callable[[], dict[tuple[str, Bounds], Tensor]]
"""Waits for an exchange and gives what this rank received, by matrix and region."""


class MatrixExchange:
    """The map over a group of ranks; see ``MatrixMap``."""

    def __init__(
        self,
        owned: Sequence[HeldParameter],
        group: dist.ProcessGroup,
        device: torch.device,
        round_bytes: int = ROUND_BYTES,
    ) -> None:
        """Learn who holds what; collective over ``group``, whose tensors are on ``device``."""
        self._group, self._device, self._round_bytes = group, device, round_bytes
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        mine = {o.info.name: (o.info.shape, bounds_of(o.region)) for o in owned}
        everyone: list[Any] = [None] * self._size
        dist.all_gather_object(everyone, mine, group=group)
        self._matrices = matrices_of(everyone)
        self._own = {name: bounds for name, (_, bounds) in mine.items()}
        self._plans: dict[tuple[str, ...], list[Round]] = {}

    def __call__(self, function: MatrixFunction, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply ``function`` to the whole of every matrix in ``values``; see ``MatrixMap``."""
        if not values:
            return {}
        rounds = self._plan(values)
        dtype, home = next((v.dtype, v.device) for v in values.values())
        sent = {name: value.detach().to(self._device) for name, value in values.items()}
        results: list[Arrived] = []
        arriving = self._start_gather(rounds[0], sent, dtype)
        for number, now in enumerate(rounds):
            arrived = arriving()
            if number + 1 < len(rounds):  # the next matrices travel while these are worked on
                arriving = self._start_gather(rounds[number + 1], sent, dtype)
            wholes = [self._assemble(name, arrived) for name in now.names]
            done = dict(zip(now.names, function(wholes), strict=True))
            results.append(self._start_scatter(now, done, dtype))
        parts = {name: part for finish in results for (name, _), part in finish().items()}
        return {name: parts[name].to(home) for name in values}

    def _plan(self, values: Mapping[str, Tensor]) -> list[Round]:
        names = tuple(values)
        if names not in self._plans:
            for name, value in values.items():
                if value.shape != _shape(self._own[name]):
                    raise ValueError(
                        f"{name}: this rank holds {_shape(self._own[name])} of it, found a part of "
                        f"shape {tuple(value.shape)}"
                    )
            chosen = [self._matrices[name] for name in names]
            element = next(iter(values.values())).element_size()
            limit = self._round_bytes // element
            self._plans[names] = plan_rounds(chosen, self._size, self._rank, limit)
        return self._plans[names]

    def _start_gather(
        self, now: Round, values: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Arrived:
        return self._start(now.gather, lambda transfer: values[transfer.name], dtype)

    def _start_scatter(self, now: Round, done: Mapping[str, Tensor], dtype: torch.dtype) -> Arrived:
        return self._start(now.scatter, lambda t: done[t.name][slices_of(t.bounds)], dtype)

    def _start(
        self,
        transfers: Sequence[Transfer],
        value_of: Callable[[Transfer], Tensor],
        dtype: torch.dtype,
    ) -> Arrived:
        """Send this rank's part of ``transfers``; what stays on a rank is not copied."""
        mine = [t for t in transfers if self._rank in (t.source, t.target)]
        staying = {
            (t.name, t.bounds): value_of(t) for t in mine if t.source == t.target == self._rank
        }
        if all(t.source == t.target for t in transfers):
            return lambda: staying
        outgoing = [t for t in mine if t.target != self._rank]
        incoming = [t for t in mine if t.source != self._rank]
        outgoing.sort(key=lambda t: t.target)
        incoming.sort(key=lambda t: t.source)
        flat = [value_of(t).reshape(-1) for t in outgoing]
        nothing = torch.empty(0, dtype=dtype, device=self._device)
        sent = torch.cat([nothing, *flat])
        received = nothing.new_empty(sum(_numel(t.bounds) for t in incoming))
        work = dist.all_to_all_single(
            received,
            sent,
            self._split((t.source, t.bounds) for t in incoming),
            self._split((t.target, t.bounds) for t in outgoing),
            group=self._group,
            async_op=True,
        )

        def finish() -> dict[tuple[str, Bounds], Tensor]:
            work.wait()
            parts = torch.split(received, [_numel(t.bounds) for t in incoming])
            arrived = {
                (t.name, t.bounds): part.view(_shape(t.bounds))
                for t, part in zip(incoming, parts, strict=True)
            }
            return staying | arrived

        return finish

    def _split(self, peers: Iterable[tuple[int, Bounds]]) -> list[int]:
        """Count the elements exchanged with every rank of the group."""
        counts = [0] * self._size
        for rank, bounds in peers:
            counts[rank] += _numel(bounds)
        return counts

    def _assemble(self, name: str, arrived: Mapping[tuple[str, Bounds], Tensor]) -> Tensor:
        matrix = self._matrices[name]
        parts = {bounds: arrived[name, bounds] for bounds in matrix.holders if _numel(bounds)}
        first = next(iter(parts.values()))
        if len(parts) == 1:
            return first
        result = first.new_empty(matrix.shape)
        for bounds, part in parts.items():
            result[slices_of(bounds)] = part
        return result


def matrices_of(
    everyone: Sequence[Mapping[str, tuple[tuple[int, ...], Bounds]]],
) -> dict[str, Matrix]:
    """Put together what every rank holds (shape and bounds by name): the 2-D parameters.

    Raises:
        ValueError: the regions do not make up a whole matrix.
    """
    matrices = {}
    for name, (shape, _) in everyone[0].items():
        if len(shape) != 2:
            continue
        holders: dict[Bounds, list[int]] = {}
        for rank, held in enumerate(everyone):
            holders.setdefault(held[name][1], []).append(rank)
        if sum(map(_numel, holders)) != math.prod(shape):
            raise ValueError(f"the ranks' regions of {name} do not make up the whole: {holders}")
        matrices[name] = Matrix(
            name=name,
            shape=shape,
            holders={bounds: tuple(holders[bounds]) for bounds in sorted(holders)},
        )
    return matrices


def owners_of(matrices: Sequence[Matrix], num_ranks: int) -> dict[str, int]:
    """Give every matrix an owner: the dearest first, each to the rank with the least work."""
    load = [0] * num_ranks
    owners = {}
    for matrix in sorted(matrices, key=lambda m: m.cost, reverse=True):
        owner = load.index(min(load))
        load[owner] += matrix.cost
        owners[matrix.name] = owner
    return owners


def plan_rounds(
    matrices: Sequence[Matrix], num_ranks: int, rank: int, limit: int = ROUND_BYTES // 4
) -> list[Round]:
    """Share ``matrices`` out in rounds of at most ``limit`` elements for each owner.

    A region that several ranks hold is sent by the one nearest to the owner.
    """
    owners = owners_of(matrices, num_ranks)
    numbers, filled = [0] * num_ranks, [0] * num_ranks
    rounds: list[list[Matrix]] = []
    for matrix in matrices:
        owner, numel = owners[matrix.name], math.prod(matrix.shape)
        if filled[owner] and filled[owner] + numel > limit:
            numbers[owner], filled[owner] = numbers[owner] + 1, 0
        filled[owner] += numel
        if numbers[owner] == len(rounds):
            rounds.append([])
        rounds[numbers[owner]].append(matrix)
    return [_round(members, owners, rank) for members in rounds]


def _round(members: Sequence[Matrix], owners: Mapping[str, int], rank: int) -> Round:
    gather, scatter = [], []
    for matrix in members:
        owner = owners[matrix.name]
        for bounds, holders in matrix.holders.items():
            if _numel(bounds):
                nearest = min(holders, key=lambda holder: abs(holder - owner))
                gather.append(Transfer(matrix.name, bounds, nearest, owner))
            scatter += [Transfer(matrix.name, bounds, owner, holder) for holder in holders]
    mine = tuple(matrix.name for matrix in members if owners[matrix.name] == rank)
    return Round(mine, tuple(gather), tuple(scatter))


def bounds_of(region: Region) -> Bounds:
    """Give a region as numbers; every empty one alike."""
    if not math.prod(sizes(region)):
        return tuple((0, size) for size in sizes(region))
    return tuple((part.start, part.stop) for part in region)


def slices_of(bounds: Bounds) -> Region:
    """Give a region back as slices."""
    return tuple(slice(start, stop) for start, stop in bounds)


def _shape(bounds: Bounds) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in bounds)


def _numel(bounds: Bounds) -> int:
    return math.prod(_shape(bounds))
