"""Pipelines of several stages per rank against one process, below the engine."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.pipeline_idle import measure, operations, parts_of
from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import SEVERAL_STAGES, ParallelConfig
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.errors import LayoutError
from llmtrain.parallel.apply import build_local_model
from llmtrain.parallel.mesh import World
from llmtrain.parallel.pipeline import SCHEDULES
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss
from tests.world import RankPool

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
)
HEAVY_HEAD = replace(MODEL, vocab_size=1031, tie_word_embeddings=True)
"""Its first and its last stage of four have no block."""

SINGLE = ParallelConfig(dp_shard=1)


def engine(precision: str) -> EngineConfig:
    return EngineConfig(device="cpu", precision=precision, timeout_s=60.0)  # type: ignore[arg-type]


def gradients(
    place: Place, parallel: ParallelConfig, model: ModelConfig, precision: str, rows: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Loss sums of an evaluation in one and of a step in many micro-batches, and gradients.

    The step is taken twice, so that what one leaves behind would show in the next.
    """
    with World(parallel, engine(precision), place) as world:
        loss = pretraining_loss(2, chunk_tokens=16)
        local = build_local_model(model, parallel, engine(precision), world, 5, loss)
        shape = BatchShape(rows=rows, sequence_length=12, vocab_size=model.vocab_size)
        whole = synthetic_batch(shape, seed=3, step=0)
        batch = rank_rows(whole, world.dp_rank, world.dp_size, micro_batch_size=1)
        found = [local.run(replace(batch, num_microbatches=1), scale=None, training=False)]
        for _ in range(2):
            local.clear_gradients()
            found.append(local.run(batch, scale=None, training=True))
            summed = local.reduce_gradients()
        owned = {o.info.name: g for o, g in zip(local.parameters, summed, strict=True)}
        return [sums["loss_sum"].item() for sums in found if sums], owned


def run(
    ranks: RankPool,
    parallel: ParallelConfig,
    model: ModelConfig = MODEL,
    precision: str = "fp64",
    rows: int = 8,
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Losses of all ranks together, and each rank's gradients; one process is this one."""
    size = parallel.pp * int(parallel.dp_shard)
    if size == 1:
        loss, owned = gradients(Place(), parallel, model, precision, rows)
        return loss, [owned]
    answers = ranks.run(gradients, parallel, model, precision, rows, size=size)
    losses = torch.tensor([loss for loss, _ in answers if loss], dtype=torch.float64).sum(0)
    return losses.tolist(), [owned for _, owned in answers]


@pytest.mark.parametrize(
    ("model", "pp", "schedule", "stages_per_rank", "rows"),
    [
        (MODEL, 4, "1f1b", 1, 5),
        (MODEL, 4, "interleaved_1f1b", 2, 10),
        (MODEL, 2, "interleaved_1f1b", 4, 3),
        (MODEL, 2, "interleaved_zero_bubble", 3, 4),
        (MODEL, 4, "zbv", 2, 9),
        (MODEL, 4, "dualpipev", 2, 8),
        (HEAVY_HEAD, 4, "1f1b", 1, 4),
        (HEAVY_HEAD, 2, "zbv", 2, 4),
    ],
)
def test_stages_compute_what_one_process_computes(
    model: ModelConfig, pp: int, schedule: str, stages_per_rank: int, rows: int, ranks: RankPool
) -> None:
    parallel = ParallelConfig(
        pp=pp, dp_shard=1, schedule=schedule, stages_per_rank=stages_per_rank  # type: ignore[arg-type]
    )  # fmt: skip
    want_loss, (want,) = run(ranks, SINGLE, model, rows=rows)
    loss, parts = run(ranks, parallel, model, rows=rows)

    assert loss == pytest.approx(want_loss, rel=1e-14)
    assert set().union(*parts) == set(want)
    for part in parts:
        for name, gradient in part.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-12, atol=1e-14, msg=name)


@pytest.fixture(scope="module")
def bf16(ranks: RankPool) -> dict[int, list[dict[str, Tensor]]]:
    """Gradients of whole backwards by dp_shard."""
    sharded = ParallelConfig(pp=2, dp_shard=2)
    return {size: run(ranks, parallel, precision="bf16")[1] for size, parallel in
            ((1, SINGLE), (2, sharded))}  # fmt: skip


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv"])
@pytest.mark.parametrize("dp_shard", [1, 2])
def test_split_backwards_add_up_in_fp32(
    schedule: str, dp_shard: int, ranks: RankPool, bf16: dict[int, list[dict[str, Tensor]]]
) -> None:
    parallel = ParallelConfig(pp=2, dp_shard=dp_shard, schedule=schedule)  # type: ignore[arg-type]
    _, got = run(ranks, parallel, precision="bf16")

    for rank in range(dp_shard):  # ranks rank, rank + dp_shard, ... hold the same shards
        want, ours = (
            {name: gradient for part in parts[rank::dp_shard] for name, gradient in part.items()}
            for parts in (bf16[dp_shard], got)
        )
        assert ours.keys() == want.keys()
        for name, gradient in want.items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(ours[name], gradient, rtol=0, atol=0, msg=name)


def refusal(place: Place, parallel: ParallelConfig, rows: int, micro: int) -> str:
    with World(parallel, engine("fp32"), place) as world:
        local = build_local_model(
            MODEL, parallel, engine("fp32"), world, 5, pretraining_loss(2, chunk_tokens=16)
        )
        batch = synthetic_batch(BatchShape(rows=rows, sequence_length=8, vocab_size=67), 3, 0)
        try:
            local.run(replace(batch, num_microbatches=micro), scale=None, training=True)
        except LayoutError as error:
            return str(error)
    return "ran"


def test_uneven_microbatches_are_refused_before_a_rank_waits(ranks: RankPool) -> None:
    parallel = ParallelConfig(pp=2, dp_shard=1, schedule="zbv")
    for rows, micro, message in (
        (7, 4, "7 rows do not split into 4 equal micro-batches"),
        (3, 3, "3 micro-batches cannot fill parallel.pp=2 with schedule=zbv, which takes at least"),
    ):
        for answer in ranks.run(refusal, parallel, rows, micro, size=2):
            assert answer.startswith(message)


def slept(place: Place, schedule: str, num_microbatches: int) -> list[list[tuple[str, int]]]:
    """What the ranks slept for in order, at no length."""
    parallel = ParallelConfig(pp=4, dp_shard=1)
    with World(parallel, engine("fp32"), place) as world:
        v = 2 if schedule in SEVERAL_STAGES else 1
        logs = measure(world, schedule, num_microbatches, v, unit=0.0, repeat=1)
        return [[(one.kind, one.stage) for one in log] for log in logs]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_do_in_order_what_idle_fractions_are_computed_from(
    schedule: str, ranks: RankPool
) -> None:
    v = 2 if schedule in SEVERAL_STAGES else 1
    logs = ranks.run(slept, schedule, 8, size=4)[0]

    for log, actions in zip(logs, operations(schedule, 4, 8, v), strict=True):
        done = iter(log)
        for op in (op for action in actions for op in action):
            want = [(kind, op.stage) for kind in parts_of(op)]
            assert sorted(next(done) for _ in want) == want  # autograd may begin with the weights
        assert list(done) == []
