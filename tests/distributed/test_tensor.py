"""Tensor and sequence parallelism of the bare model against one process, before any engine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.errors import LayoutError
from llmtrain.model.transformer import Transformer
from llmtrain.parallel.collectives import all_to_all, gather_along, reduce_scatter_along
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.parallel.tensor import apply_tensor_parallel, even_part
from llmtrain.parity import compare_gradients
from llmtrain.planner.stages import split_layers
from llmtrain.train.loss import pretraining_loss
from tests.world import RankPool

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=20,
    intermediate_size=30,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=4,
)
"""67 and 30 are uneven over 4 ranks, 67 over 2."""

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A model and how many stages it is cut into."""

    model: ModelConfig
    num_stages: int = 1
    z_loss_weight: float = 0.0


CASES = {
    "plain": Case(MODEL),
    "biases_and_norms": Case(
        replace(MODEL, attention_bias=True, attention_output_bias=True, qk_norm=True)
    ),
    "tied_with_z_loss": Case(replace(MODEL, tie_word_embeddings=True), z_loss_weight=0.01),
    "stages": Case(MODEL, num_stages=2, z_loss_weight=0.01),
    "stages_tied": Case(replace(MODEL, tie_word_embeddings=True), num_stages=2),
}


@dataclass(frozen=True)
class Numbers:
    """What one forward and backward gave; whole tensors."""

    loss: float
    metrics: dict[str, list[float]]
    hidden: Tensor
    gradients: dict[str, Tensor]


@contextmanager
def tensor_group(place: Place) -> Iterator[dist.ProcessGroup | None]:
    parallel = ParallelConfig(dp_shard=1, tp=place.world_size)
    with World(parallel, EngineConfig(device="cpu", timeout_s=60.0), place) as world:
        yield world.group("tp")


def build(
    case: Case, group: dist.ProcessGroup | None, dtype: torch.dtype
) -> list[tuple[Transformer, dict[str, tuple[slice, ...]]]]:
    """The stages in order with what this rank holds of them; every whole value is the same."""
    stages = []
    for number, layers in enumerate(split_layers(case.model, case.num_stages)):
        last = number == case.num_stages - 1
        with torch.device("meta"):
            stage = Transformer(case.model, layers, embedding=number == 0, head=last).to(dtype)
        shapes = {name: parameter.shape for name, parameter in stage.named_parameters()}
        slices = {} if group is None else apply_tensor_parallel(stage, group)
        stage.to_empty(device="cpu")
        assert list(shapes) == [name for name, _ in stage.named_parameters()]
        for name, parameter in stage.named_parameters():
            seed = sum(name.encode())
            generator = torch.Generator().manual_seed(0 if "embed" in name else seed)
            if case.model.tie_word_embeddings and "lm_head" in name:
                generator.manual_seed(0)
            whole = torch.randn(shapes[name], generator=generator) * 0.3
            parameter.data.copy_(whole[slices[name]] if name in slices else whole)
        stages.append((stage, slices))
    return stages


def numbers(place: Place, case: Case, precision: str) -> Numbers:
    """Loss, hidden and gradients; assembled over the ranks."""
    shape = BatchShape(rows=2, sequence_length=12, vocab_size=case.model.vocab_size)
    batch = synthetic_batch(shape, seed=1, step=0)
    loss_function = pretraining_loss(shape.num_sources, 5, case.z_loss_weight)
    with tensor_group(place) if place.world_size > 1 else nullcontext(None) as group:
        stages = build(case, group, DTYPES[precision])
        hidden = batch.tokens
        for stage, _ in stages:
            hidden = stage(hidden, batch.positions, batch.document_ids)
        loss, metrics = loss_function(hidden, stages[-1][0].head, batch)
        (loss / 7).backward()
        gradients: dict[str, Tensor] = {}
        for stage, slices in stages:
            for name, parameter in stage.named_parameters():
                gradients[name] = whole_gradient(parameter, slices.get(name), group)
        if case.model.tie_word_embeddings and case.num_stages > 1:
            gradients["model.embed_tokens.weight"] += gradients.pop("lm_head.weight")
    return Numbers(
        loss=loss.item(),
        metrics={name: value.tolist() for name, value in metrics.items()},
        hidden=hidden.detach(),
        gradients=gradients,
    )


def whole_gradient(
    parameter: Tensor, slices: tuple[slice, ...] | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Put the parts of all ranks together; what is not cut is summed."""
    assert parameter.grad is not None
    if group is None:
        return parameter.grad
    shape, grad = list(parameter.shape), parameter.grad
    if slices is not None:
        ends = torch.tensor([part.stop for part in slices])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group)
        shape = ends.tolist()
    whole = grad.new_zeros(shape)
    whole[slices if slices is not None else ...] = grad
    dist.all_reduce(whole, group=group)
    return whole


def check(ranks: RankPool, case: Case, tp: int, precision: str, tolerance: float) -> None:
    reference = "fp32" if precision == "bf16" else precision
    want: Numbers = ranks.run(numbers, case, reference, size=1)[0]
    everywhere: list[Numbers] = ranks.run(numbers, case, precision, size=tp)
    got = everywhere[0]

    assert all(x.loss == got.loss and x.metrics == got.metrics for x in everywhere)
    assert abs(got.loss - want.loss) <= tolerance * want.loss
    for name, values in want.metrics.items():
        torch.testing.assert_close(got.metrics[name], values, rtol=tolerance, atol=0)
    distance = (got.hidden - want.hidden).norm() / want.hidden.norm()
    assert distance <= tolerance
    worst = max(compare_gradients(got.gradients, want.gradients, step=1), key=lambda d: d.error)
    assert worst.error <= tolerance, worst


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 5e-6), ("fp64", 1e-12)])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(
    case: str, tp: int, precision: str, tolerance: float, ranks: RankPool
) -> None:
    check(ranks, CASES[case], tp, precision, tolerance)


def test_bf16_is_near_fp32(ranks: RankPool) -> None:
    check(ranks, CASES["plain"], 2, "bf16", 5e-2)


def test_every_element_has_one_holder() -> None:
    for size in (3, 4, 67):
        parts = [even_part(size, 3, index) for index in range(3)]
        lengths = [part.stop - part.start for part in parts]
        assert [i for part in parts for i in range(size)[part]] == list(range(size))
        assert lengths == sorted(lengths, reverse=True)
        assert max(lengths) - min(lengths) <= 1


def refusals(place: Place) -> list[str]:
    """What a model or a batch that does not fit is answered with."""
    said = []
    with tensor_group(place) as group:
        assert group is not None
        for wrong in (
            {"num_key_value_heads": 1},
            {"intermediate_size": 1},
            {"vocab_size": 1},
        ):
            with torch.device("meta"):
                model = Transformer(replace(MODEL, **wrong))
            with pytest.raises(LayoutError) as problem:
                apply_tensor_parallel(model, group)
            said.append(str(problem.value))
        ((model, _),) = build(CASES["plain"], group, torch.float32)
        positions = torch.arange(5)[None]
        with pytest.raises(LayoutError) as problem:
            model(torch.zeros_like(positions), positions)
        said.append(str(problem.value))
        # the rank at either end of the vocabulary looks the id up; the other one does not wait
        for token, rank in ((-1, 0), (67, 1)):
            if rank == group.rank():
                with pytest.raises(IndexError):
                    model.model.embed_tokens(torch.full((1, 2), token))
    return said


def test_what_does_not_fit_is_refused(ranks: RankPool) -> None:
    heads, inner, vocab, sequence = ranks.run(refusals, size=2)[0]
    assert "parallel.tp=2 does not divide model.num_key_value_heads=1; use tp in {1}" in heads
    assert "cannot share model.intermediate_size=1" in inner
    assert "cannot share model.vocab_size=1" in vocab
    assert "2 ranks cannot share dim 1 of (1, 5, 20)" in sequence


COLLECTIVES: dict[str, Callable[[Tensor, dist.ProcessGroup], Tensor]] = {
    "gather": lambda x, group: gather_along(x, 1, group),
    "reduce_scatter": lambda x, group: reduce_scatter_along(x, 1, group),
    "all_to_all": lambda x, group: all_to_all(x, 1, 2, group),
    "all_to_all_back": lambda x, group: all_to_all(x, 2, 0, group),
}


def by_definition(name: str, everyone: list[Tensor], rank: int) -> Tensor:
    """What rank ``rank`` gets, from the inputs of all."""
    count = len(everyone)
    match name:
        case "gather":
            return torch.cat(everyone, dim=1)
        case "reduce_scatter":
            return sum(everyone, torch.zeros(())).chunk(count, dim=1)[rank]
        case "all_to_all":
            return torch.cat([x.chunk(count, dim=1)[rank] for x in everyone], dim=2)
        case _:
            return torch.cat([x.chunk(count, dim=2)[rank] for x in everyone], dim=0)


def collective_errors(place: Place, name: str) -> tuple[float, float]:
    """Largest error of the output and of the gradient of one collective."""
    count = place.world_size
    generator = torch.Generator().manual_seed(0)
    like = {"dtype": torch.float64, "generator": generator}
    everyone = [torch.randn(3, 8, 4, **like).requires_grad_() for _ in range(count)]
    wanted = [by_definition(name, everyone, rank) for rank in range(count)]
    weights = [torch.randn(out.shape, **like) for out in wanted]
    total = sum((out * w).sum() for out, w in zip(wanted, weights, strict=True))
    gradient = torch.autograd.grad(total, everyone)[place.rank]
    with tensor_group(place) as group:
        assert group is not None
        mine = everyone[place.rank].detach().transpose(0, 2).contiguous().transpose(0, 2)
        mine.requires_grad_()
        out = COLLECTIVES[name](mine, group)
        (found,) = torch.autograd.grad((out * weights[place.rank]).sum(), mine)
    return (
        (out - wanted[place.rank]).abs().max().item(),
        (found - gradient).abs().max().item(),
    )


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_and_their_gradients(name: str, ranks: RankPool) -> None:
    for value, gradient in ranks.run(collective_errors, name, size=4):
        assert value <= 1e-15
        assert gradient <= 1e-14
