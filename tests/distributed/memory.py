"""Body that ranks run to weigh what they hold."""

from collections.abc import Iterable

import torch
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.native import NativeEngine
from llmtrain.engine.step import no_limits
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import Place, World
from llmtrain.planner.memory import Seat
from llmtrain.train.loss import pretraining_loss

MODEL = ModelConfig(
    vocab_size=67,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    qk_norm=True,
    attention_bias=True,
    attention_output_bias=True,
    tie_word_embeddings=True,
)
"""Sizes that neither ranks nor shards divide evenly, every kind of parameter, tied ends."""

SHAPE = BatchShape(rows=8, sequence_length=24, vocab_size=MODEL.vocab_size)


def weigh(
    place: Place,
    parallel: ParallelConfig,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    model: ModelConfig = MODEL,
) -> tuple[Seat, int, int, int]:
    """Take two steps; where this rank sits, and its bytes of parameters, gradients, state."""
    with World(parallel, engine, place) as world:
        made = make_engine(
            model, parallel, engine, world, seed=5,
            loss=pretraining_loss(SHAPE.num_sources, chunk_tokens=16),
            optimizer_factory=optimizer_factory(optimizer), grad_clip_norm=1.0,
        )  # fmt: skip
        batch = rank_rows(synthetic_batch(SHAPE, 3, 0), world.dp_rank, world.dp_size, 1)
        made.train_step(batch, 1e-3, no_limits(world.device))
        group = world.group("shard") if engine.kind == "native" else world.group("dp")
        seat = Seat(pp=world.pp_rank, shard=group.rank() if group else 0, tp=world.tp_rank)
        weighed = _native(made) if isinstance(made, NativeEngine) else _zero(made, batch)
        made.close()
        return (seat, *weighed)


def _native(engine: NativeEngine) -> tuple[int, int, int]:
    local = engine._local
    modules = [p for module in local.modules for p in module.parameters()]
    kept = [owned.packed for owned in local.owned if owned.packed is not None]
    packed = [tensor for matrix in kept for tensor in (matrix.codes, matrix.factors)]
    return (
        _bytes([*modules, *(owned.local for owned in local.owned), *packed]),
        _bytes([*(o.local.grad for o in local.owned), *(p.grad for p in modules)]),
        _bytes(v for state in engine._optimizer.state.values() for v in state.values()),
    )


def _zero(engine, batch) -> tuple[int, int, int]:  # type: ignore[no-untyped-def]
    """DeepSpeed drops gradients in its step: they are weighed before it."""
    modules = list(engine._module.parameters())
    gradients: list[int] = []
    update = engine._update

    def weigh_first(*arguments: object) -> None:
        held = [*(p.grad for p in modules), *engine._holder.gradients()]
        gradients.append(_bytes(held))
        update(*arguments)

    engine._update = weigh_first
    engine.train_step(batch, 1e-3, no_limits(torch.device("cpu")))
    shards = [getattr(p, "ds_tensor", None) for p in modules]
    return (
        _bytes([*modules, *shards, *(p.tensor for p in engine._holder.partitions)]),
        gradients[0],
        _bytes(v for state in engine._optimizer.state.values() for v in state.values()),
    )


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Sum the bytes of the distinct storages behind tensors; of DTensors the local ones."""
    sizes = {}
    for tensor in tensors:
        if tensor is not None and not tensor.is_meta:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())
