"""Bodies that ranks run in the tests of optimizers, whole matrices and sums over replicas."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmtrain.config.run import RunConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.model.parameters import ParameterInfo
from llmtrain.optim.muon import orthogonalize
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.matrices import MatrixExchange, MatrixMap, run_alone
from llmtrain.parallel.place import Place
from llmtrain.parallel.precision import MasterWeights
from llmtrain.parallel.region import Region, whole
from llmtrain.parallel.replicas import GradientSum, sum_over
from tests.distributed.rig import rig

SHAPES = {
    "model.embed_tokens.weight": (11, 20),
    "model.layers.0.q_proj.weight": (20, 20),
    "model.layers.0.k_proj.weight": (10, 20),
    "model.layers.0.narrow.weight": (3, 20),
    "model.layers.0.up_proj.weight": (28, 20),
    "model.layers.0.down_proj.weight": (20, 28),
    "model.norm.weight": (20,),
}
"""Rows that four ranks share evenly, unevenly, and leave some of them empty-handed."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Held:
    """A parameter's row of the table and the region a rank holds."""

    info: ParameterInfo
    region: Region


@contextmanager
def group_of(place: Place) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=place.store, rank=place.rank, world_size=place.world_size)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def cut(size: int, rank: int, ranks: int) -> slice:
    """FSDP2's part of a dim."""
    chunk = -(-size // ranks)
    return slice(min(size, rank * chunk), min(size, (rank + 1) * chunk))


def region_of(layout: str, shape: tuple[int, ...], rank: int) -> Region:
    """The region of four ranks' layouts: sharded, replicated, and cut over columns first."""
    rest = whole(shape[1:])
    if layout == "fsdp4":
        return (cut(shape[0], rank, 4), *rest)
    if layout == "hsdp2x2":
        return (cut(shape[0], rank % 2, 2), *rest)
    if layout == "fsdp2_tp2" and len(shape) == 2:  # tp cuts columns, FSDP2 rows
        return (cut(shape[0], rank // 2, 2), cut(shape[1], rank % 2, 2))
    if layout == "dp2_tp2" and len(shape) == 2 and shape[0] > 3:  # tp cuts rows
        return (cut(shape[0], rank % 2, 2), *rest)
    return whole(shape)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def rows(layout: str, rank: int) -> list[Held]:
    return [
        Held(
            ParameterInfo(name=name, shape=shape, trainable=True, decay=len(shape) > 1),
            region_of(layout, shape, rank),
        )
        for name, shape in SHAPES.items()
    ]


Parts = dict[str, tuple[Region, Tensor]]
"""What a rank holds after some steps, by parameter name."""


def five_steps(place: Place, kind: str, precision: str, layouts: list[str]) -> list[Parts]:
    """Update five times with the same gradients on every layout; give this rank's parts."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    config = OptimizerConfig(kind=kind, lr=0.01)  # type: ignore[arg-type]
    if place.world_size == 1:
        return [_trained(rows("single", 0), config, dtype, run_alone)]
    with group_of(place) as group:
        every = [rows(layout, place.rank) for layout in layouts]
        return [
            _trained(owned, config, dtype, MatrixExchange(owned, group, CPU)) for owned in every
        ]


def _trained(
    owned: list[Held], config: OptimizerConfig, dtype: torch.dtype, run: MatrixMap
) -> Parts:
    parameters = [
        nn.Parameter(random(held.info.shape, number, dtype)[held.region].clone())
        for number, held in enumerate(owned)
    ]
    named = [(held.info, parameter) for held, parameter in zip(owned, parameters, strict=True)]
    optimizer = optimizer_factory(config)(named, run)
    optimizer.grad_scale = torch.tensor(3.0)  # type: ignore[attr-defined]
    for step in range(5):
        for number, (held, parameter) in enumerate(zip(owned, parameters, strict=True)):
            gradient = random(held.info.shape, 100 * (step + 1) + number, dtype)
            parameter.grad = gradient[held.region].clone()
        optimizer.step()
    return {h.info.name: (h.region, p.detach()) for h, p in zip(owned, parameters, strict=True)}


def inexact(place: Place, layouts: list[str], dtypes: list[torch.dtype]) -> list[str]:
    """Name the cases in which the map does not give the bits of the function of the whole."""
    with group_of(place) as group:
        return [
            f"{layout}, {dtype}, {round_bytes}"
            for layout in layouts
            for dtype in dtypes
            for round_bytes in (1, 2**20)  # one matrix in an exchange, and all of them
            if not _exact(rows(layout, place.rank), dtype, round_bytes, group)
        ]


def _exact(
    owned: list[Held], dtype: torch.dtype, round_bytes: int, group: dist.ProcessGroup
) -> bool:
    wholes = {
        held.info.name: random(held.info.shape, number, dtype)
        for number, held in enumerate(owned)
        if len(held.info.shape) == 2
    }
    regions = {held.info.name: held.region for held in owned}
    parts = {name: value[regions[name]] for name, value in wholes.items()}
    run = MatrixExchange(owned, group, CPU, round_bytes=round_bytes)
    calls = torch.zeros((), dtype=torch.int64)

    def function(matrices: Sequence[Tensor]) -> list[Tensor]:
        calls.add_(len(matrices))
        return [orthogonalize(matrix) for matrix in matrices]

    results = run(function, parts)
    dist.all_reduce(calls, group=group)
    return (
        calls.item() == len(wholes)
        and list(results) == list(parts)
        and all(
            torch.equal(results[name], orthogonalize(value)[regions[name]])
            for name, value in wholes.items()
        )
    )


class Branches(nn.Module):
    """Layers of which one is idle on odd ranks: its gradient never arrives there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.idle = nn.Linear(5, 5)

    def forward(self, x: Tensor, idle: bool) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x if idle else self.idle(x)


def summed(place: Place, how: str, bf16: bool) -> tuple[list[Tensor], list[int]]:
    """Gradients of three micro-batches summed over ranks, and all-reduces begun by each backward.

    Args:
        place: this rank.
        how: ``overlapped``, ``after``, or ``list`` for a sum of a list of gradients.
        bf16: compute in bf16 with fp32 gradients behind it.
    """
    torch.manual_seed(0)
    model = Branches()
    sources: list[Tensor] = list(model.parameters())
    parameters = sources
    if bf16:
        parameters = list(MasterWeights(list(model.parameters())).parameters)
    begun = []
    with group_of(place) as group:
        total = None
        if how != "list":
            total = GradientSum(parameters, group, how == "overlapped", sources, bucket_bytes=200)
        for _ in range(2):  # the second step finds the first one's buffers
            for parameter in parameters:
                parameter.grad = None
            if total is not None:
                total.begin(num_microbatches=3)
            for number in range(3):
                x = random((2, 5), 10 * place.rank + number, torch.float32)
                x = x.to(torch.bfloat16) if bf16 else x
                model(x, idle=place.rank % 2 == 1).sum().backward()
                begun.append(0 if total is None else total.num_started)
            if total is not None:
                total.finish()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if total is None:
            sum_over(gradients, group)
    return gradients, begun


def one_backward_too_many(place: Place) -> str:
    """The message about a gradient that comes after its sum."""
    model = nn.Linear(3, 3)
    with group_of(place) as group:
        total = GradientSum(list(model.parameters()), group, overlapped=True)
        total.begin(num_microbatches=1)
        model(torch.ones(1, 3)).sum().backward()
        try:
            model(torch.ones(1, 3)).sum().backward()
        except RuntimeError as error:
            return str(error)
        finally:
            total.finish()
    return ""


def trained(place: Place, config: RunConfig, num_steps: int) -> dict[str, Tensor]:
    """Whole parameters after some steps of the engine, from rank 0."""
    with rig(place, config) as r:
        r.train(range(num_steps))
        whole_parameters = r.engine.full_parameters()
        return whole_parameters if place.rank == 0 else {}
