"""The planner's bytes of parameters, gradients and optimizer state are those of live ranks."""

import math
from dataclasses import replace
from typing import Literal

import pytest

from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.planner.memory import seats_of, state_bytes
from tests.distributed.memory import MODEL, weigh
from tests.world import RankPool

NATIVE = {
    "one process": ParallelConfig(dp_shard=1),
    "ddp2": ParallelConfig(dp_replicate=2, dp_shard=1),
    "fsdp2": ParallelConfig(dp_shard=2),
    "fsdp4": ParallelConfig(dp_shard=4),
    "hsdp2x2": ParallelConfig(dp_replicate=2, dp_shard=2),
    "tp2": ParallelConfig(dp_shard=1, tp=2),
    "tp4": ParallelConfig(dp_shard=1, tp=4),
    "cp2": ParallelConfig(dp_shard=1, cp=2),
    "fsdp2 cp2": ParallelConfig(dp_shard=2, cp=2),
    "fsdp2 tp2": ParallelConfig(dp_shard=2, tp=2),
    "pp2": ParallelConfig(pp=2, dp_shard=1),
    "pp2 interleaved": ParallelConfig(pp=2, dp_shard=1, schedule="interleaved_1f1b"),
    "pp2 zbv": ParallelConfig(pp=2, dp_shard=1, schedule="zbv"),
    "pp2 fsdp2": ParallelConfig(pp=2, dp_shard=2),
    "pp2 tp2": ParallelConfig(pp=2, dp_shard=1, tp=2),
}


def check(
    ranks: RankPool,
    parallel: ParallelConfig,
    engine: EngineConfig,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
    model: ModelConfig = MODEL,
) -> None:
    """Compare every rank's three figures with the formula's, within 1 %."""
    assert isinstance(parallel.dp_shard, int)
    axes = (parallel.pp, parallel.dp_replicate, parallel.dp_shard, parallel.cp, parallel.tp)
    weighed = ranks.run(weigh, parallel, engine, optimizer, model, size=math.prod(axes))

    assert {seat for seat, *_ in weighed} == set(seats_of(parallel, parallel.dp_shard))
    for seat, *found in weighed:
        want = state_bytes(model, parallel, engine, optimizer, parallel.dp_shard, seat)
        assert found == pytest.approx(
            [want.parameters, want.gradients, want.optimizer], rel=0.01
        ), seat


@pytest.mark.parametrize("layout", NATIVE)
def test_native_fp32(layout: str, ranks: RankPool) -> None:
    check(ranks, NATIVE[layout], EngineConfig(device="cpu", timeout_s=60.0))


@pytest.mark.parametrize(("layout", "precision"), [("pp2", "bf16"), ("fsdp2", "fp64")])
def test_native_precisions(layout: str, precision: str, ranks: RankPool) -> None:
    check(ranks, NATIVE[layout], EngineConfig(precision=precision, device="cpu", timeout_s=60.0))


@pytest.mark.parametrize(("layout", "optimizer"), [("fsdp2", "muon"), ("tp2", "lion")])
def test_native_optimizers(layout: str, optimizer: str, ranks: RankPool) -> None:
    engine = EngineConfig(device="cpu", timeout_s=60.0)
    check(ranks, NATIVE[layout], engine, OptimizerConfig(kind=optimizer))


@pytest.mark.parametrize("layout", ["one process", "fsdp2"])
def test_native_without_masters(layout: str, ranks: RankPool) -> None:
    engine = EngineConfig(precision="bf16", master_dtype="bf16", device="cpu", timeout_s=60.0)
    check(ranks, NATIVE[layout], engine, OptimizerConfig(state_dtype="bf16"))


@pytest.mark.parametrize(
    ("layout", "precision", "base"),
    [
        ("one process", "bf16", None),
        ("fsdp2", "bf16", None),
        ("fsdp2 tp2", "fp32", None),
        ("pp2", "bf16", None),
        ("pp2", "fp32", "nf4"),
    ],
)
def test_native_adapters(
    layout: str, precision: str, base: Literal["nf4"] | None, ranks: RankPool
) -> None:
    """The base has the type it is computed in, or 4 bits, and neither gradients nor state."""
    engine = EngineConfig(precision=precision, device="cpu", timeout_s=60.0)
    model = replace(MODEL, adapter=AdapterConfig(rank=6, quantize_base=base))
    check(ranks, NATIVE[layout], engine, model=model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_zero(stage: int, precision: str, deepspeed_ranks: RankPool) -> None:
    engine = EngineConfig(
        kind="deepspeed",
        precision=precision,
        device="cpu",
        timeout_s=60.0,
        deepspeed=DeepSpeedConfig(zero_stage=stage),
    )
    check(deepspeed_ranks, ParallelConfig(dp_shard=2), engine)
