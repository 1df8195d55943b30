"""What two runs of a block or of the head find, and what they leave as it was."""

import functools
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.sdpa import sdpa_attention
from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule, batch_fields
from llmtrain.train.loss import pretraining_loss
from llmtrain.train.twice import Twice, alike
from tests.distributed.layouts import MODELS

MODEL = MODELS["base"]
SHAPE = BatchShape(rows=2, sequence_length=16, vocab_size=MODEL.vocab_size)
BATCH = synthetic_batch(SHAPE, seed=3, step=0)


class TwoRanks:
    """The part of a World that is used; chosen sums over its ranks come out wrong."""

    dp_size = 2

    def __init__(self, wrong: int | None = None) -> None:
        self.sums = 0
        self.wrong = wrong

    def sum(self, values: Tensor, axis: str) -> Tensor:
        assert axis == "dp"
        self.sums += 1
        if self.sums == self.wrong:
            values.view(torch.int32)[5] ^= 1
        return values


@pytest.fixture
def stage() -> StageModule:
    transformer = Transformer(MODEL, attention=sdpa_attention)
    initialize_model(transformer, MODEL, seed=0)
    return StageModule(transformer, pretraining_loss(SHAPE.num_sources, chunk_tokens=8))


def searched(stage: StageModule, world: TwoRanks | None = None) -> tuple[Tensor, list[str]]:
    """Loss and what is found of a forward on every block and the head."""
    twice = Twice(cast(World, world or TwoRanks()), [stage], exact=True)
    with twice.watching(), torch.no_grad():
        loss = stage(BATCH.tokens, **batch_fields(BATCH))
    return loss, [what for _, what in twice.found()]


def test_a_sound_stage_gives_its_loss_and_keeps_nothing(stage: StageModule) -> None:
    before = {module: dict(vars(module)) for module in stage.modules()}
    told: list[Tensor] = []
    for parameter in stage.parameters():
        parameter.register_post_accumulate_grad_hook(told.append)  # type: ignore[no-untyped-call]
    loss, found = searched(stage)
    assert found == []
    with torch.no_grad():
        assert torch.equal(loss, stage(BATCH.tokens, **batch_fields(BATCH)))
    assert told == []
    assert all(parameter.grad is None for parameter in stage.parameters())
    assert all(vars(m).keys() == kept.keys() for m, kept in before.items())
    assert stage.loss is before[stage]["loss"]


def test_a_wrong_gradient_of_the_head_is_named(stage: StageModule) -> None:
    loss, runs = stage.loss, 0
    assert loss is not None

    def wrong(hidden: Tensor, head: nn.Module, batch: StepBatch) -> Any:
        nonlocal runs
        runs += 1
        total, metrics = loss(hidden, head, batch)
        return (total if runs == 1 else _Doubled.apply(total)), metrics

    stage.loss = wrong
    assert searched(stage)[1] == [
        "the head's gradient of its matrix",
        "the head's gradient of its input",
    ]


class _Doubled(torch.autograd.Function):
    """The value as it is, its gradient twice."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def test_a_wrong_output_is_named_with_its_layer(stage: StageModule) -> None:
    runs = 0

    def spoil(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return output * (1 + 1e-6) if runs == 2 else output

    stage.transformer.model.layers["2"].get_submodule("mlp").register_forward_hook(spoil)
    assert searched(stage)[1][0] == "layer 2's output"


@pytest.mark.parametrize(("number", "where"), [(1, "layer 0"), (4, "layer 1"), (10, "the head")])
def test_a_wrong_sum_over_ranks_is_named(stage: StageModule, number: int, where: str) -> None:
    """Two sums for every block, and two for the head."""
    found = searched(stage, TwoRanks(wrong=number))[1]
    assert found == [f"{where}'s sum of gradients over ranks"]


def test_frozen_parameters_are_asked_for_no_gradient(stage: StageModule) -> None:
    stage.requires_grad_(False)
    world = TwoRanks()
    assert searched(stage, world)[1] == []
    assert world.sums == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_order_of_adding_is_no_fault_and_a_high_bit_is(dtype: torch.dtype) -> None:
    """Sums of 4,096 terms, in fp32 or wider, as a weight's gradient has them."""
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(4096, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    terms = (x[:, :, None] * g[:, None, :]).to(torch.promote_types(dtype, torch.float32))
    there, back = functools.reduce(torch.add, terms), functools.reduce(torch.add, terms.flip(0))
    assert not torch.equal(there, back)
    first, again = there.to(dtype), back.to(dtype)
    assert alike(first, again)
    wrong = first.clone()
    wrong[3, 4] *= 2
    assert not alike(first, wrong)
    wrong[3, 4] = torch.inf
    assert not alike(first, wrong)
    assert alike(wrong, wrong)
