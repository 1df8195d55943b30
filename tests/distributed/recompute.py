"""Bodies that ranks run in the tests of recomputation and compilation."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.engine import DeepSpeedConfig, EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel import offload
from llmtrain.parallel.apply import build_local_model
from llmtrain.parallel.local import LocalModel
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss
from tests.distributed.rig import snapshot

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    qk_norm=True,
    attention_bias=True,
)
SHAPE = BatchShape(rows=4, sequence_length=24, vocab_size=MODEL.vocab_size)
"""Two micro-batches on each of two data ranks."""


def exact(
    place: Place, parallel: ParallelConfig, policies: tuple[str, ...], precision: str = "fp32"
) -> list[str]:
    """Compare a step with each policy to one that keeps everything; name what differs in bits."""
    engine = EngineConfig(precision=precision, device="cpu", timeout_s=60.0)
    with World(parallel, engine, place) as world:
        want = step(world, parallel, engine)
        assert any(name != "loss" and value.any() for name, value in want.items())
        different = []
        for policy in policies:
            got = step(world, replace(parallel, recompute=policy, recompute_budget=0.4), engine)
            assert got.keys() == want.keys()
            different += [
                f"{policy}: {name}" for name in want if not torch.equal(got[name], want[name])
            ]
        return different


def exact_when(place: Place, parallel: ParallelConfig, changes: dict[str, Any]) -> list[str]:
    """Compare a step with ``changes`` of the layout to one without; name what differs in bits."""
    engine = EngineConfig(device="cpu", timeout_s=60.0)
    small, offload.MIN_BYTES = offload.MIN_BYTES, 1
    try:
        with World(parallel, engine, place) as world:
            want = step(world, parallel, engine)
            got = step(world, replace(parallel, **changes), engine)
    finally:
        offload.MIN_BYTES = small
    return [name for name in want if not torch.equal(got[name], want[name])]


def inside_and_after(place: Place, parallel: ParallelConfig) -> list[str]:
    """Train two steps with updates in the backward and after it; name states that differ."""
    engine = EngineConfig(precision="bf16", device="cpu", timeout_s=60.0)
    states = []
    with World(parallel, engine, place) as world:
        rows = rank_rows(synthetic_batch(SHAPE, 3, 0), world.dp_rank, world.dp_size, 1)
        batch = replace(rows, num_microbatches=1)
        for inside in (False, True):
            made = make_engine(
                MODEL, parallel, engine, world, seed=5,
                loss=pretraining_loss(SHAPE.num_sources, chunk_tokens=16),
                optimizer_factory=optimizer_factory(OptimizerConfig()), grad_clip_norm=math.inf,
                update_in_backward=inside,
            )  # fmt: skip
            for _ in range(2):
                result = made.train_step(batch, 1e-2, no_limits(world.device))
            states.append({**snapshot(made), "grad norm": result.grad_norm})
            made.close()
    after, inside_ = states
    return [name for name in after if not torch.equal(after[name], inside_[name])]


def compiled(place: Place, parallel: ParallelConfig, backend: str) -> float:
    """Largest relative error of any gradient of a step with compiled blocks."""
    from llmtrain.parallel import compile as blocks

    before, blocks.BACKEND = blocks.BACKEND, backend
    engine = EngineConfig(device="cpu", timeout_s=60.0)
    try:
        with World(parallel, engine, place) as world:
            want = step(world, replace(parallel, recompute="none"), engine)
            got = step(world, parallel, replace(engine, compile=True))
    finally:
        blocks.BACKEND = before
        torch._dynamo.reset()
    return max(
        ((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-6)).item()
        for name in want
    )


def step(world: World, parallel: ParallelConfig, engine: EngineConfig) -> dict[str, Tensor]:
    """Loss and local gradients of two micro-batch steps from the same start."""
    local = build(world, parallel, engine)
    batch = rank_rows(synthetic_batch(SHAPE, seed=3, step=0), world.dp_rank, world.dp_size, 1)
    sums = local.run(batch, scale=torch.tensor(0.01), training=True)
    gradients = local.reduce_gradients()
    named = zip(local.parameters, gradients, strict=True)
    loss = {name: value for name, value in sums.items() if name == "loss_sum"}
    return {f"{o.info.name} {o.region}": g.clone() for o, g in named} | loss


def build(world: World, parallel: ParallelConfig, engine: EngineConfig) -> LocalModel:
    """The part of the model on this rank."""
    loss = pretraining_loss(num_sources=SHAPE.num_sources, chunk_tokens=16)
    return build_local_model(MODEL, parallel, engine, world, seed=5, loss=loss)


def exact_under_zero(place: Place, stage: int, policies: tuple[str, ...]) -> list[str]:
    """As ``exact``, through DeepSpeed's ZeRO with nothing kept gathered."""
    keys = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    engine = EngineConfig(
        kind="deepspeed", device="cpu", timeout_s=60.0,
        deepspeed=DeepSpeedConfig(zero_stage=stage, config=keys),
    )  # fmt: skip
    parallel = ParallelConfig(dp_shard=place.world_size)
    with World(parallel, engine, place) as world:
        whole = {
            policy: _zero_step(world, replace(parallel, recompute=policy), engine)
            for policy in ("none", *policies)
        }
    return [
        f"{policy}: {name}"
        for policy in policies
        for name, want in whole["none"].items()
        if not torch.equal(whole[policy][name], want)
    ]


def _zero_step(world: World, parallel: ParallelConfig, engine: EngineConfig) -> dict[str, Tensor]:
    """Full gradients of the second of two steps."""
    made = make_engine(
        MODEL, parallel, engine, world, seed=5,
        loss=pretraining_loss(SHAPE.num_sources, chunk_tokens=16),
        optimizer_factory=optimizer_factory(OptimizerConfig()), grad_clip_norm=1.0,
    )  # fmt: skip
    batch = rank_rows(synthetic_batch(SHAPE, 3, 0), world.dp_rank, world.dp_size, 1)
    for _ in range(2):
        made.train_step(batch, 1e-2, no_limits(world.device))
    gradients = made.gradients()
    made.close()
    return gradients
