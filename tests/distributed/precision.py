"""Bodies that ranks run in the tests of fp8, bf16 states and stochastic rounding."""

from dataclasses import replace
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import OptimizerConfig, TrainingConfig
from llmtrain.data.synthetic import rank_rows, synthetic_batch
from llmtrain.engine.step import no_limits
from llmtrain.parallel.place import Place
from tests.distributed.layouts import ENGINE, SEED, SHAPE
from tests.distributed.rig import Rig, digest, loss_of, rig
from tests.distributed.states import restore

MODEL = ModelConfig(
    vocab_size=SHAPE.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
"""Sizes that float8 products take."""

LEARNING_RATE = 3e-3
TWO_ROWS = replace(SHAPE, rows=2)
"""Two rows are two micro-batches wherever they are: sums of two gradients have one order."""


def configured(
    parallel: dict[str, Any] | None = None, state_dtype: str = "fp32", **engine: Any
) -> RunConfig:
    """A bf16 run of ``MODEL`` without a clip, whose divisor would depend on the layout."""
    return RunConfig(
        model=MODEL,
        parallel=ParallelConfig(**{"dp_shard": 1, **(parallel or {})}),
        engine=replace(ENGINE, **{"precision": "bf16", **engine}),
        training=TrainingConfig(
            num_tokens=10**6,
            sequence_length=SHAPE.sequence_length,
            global_batch_tokens=TWO_ROWS.rows * SHAPE.sequence_length,
            seed=SEED,
        ),
        optimizer=OptimizerConfig(
            lr=LEARNING_RATE, grad_clip_norm=float("inf"), state_dtype=state_dtype
        ),
    )


def train(r: Rig, steps: range) -> list[float]:
    """Losses of steps of two rows."""
    losses = []
    for step in steps:
        whole = synthetic_batch(TWO_ROWS, seed=3, step=step)
        batch = rank_rows(whole, r.world.dp_rank, r.world.dp_size, micro_batch_size=1)
        losses.append(loss_of(r.engine.train_step(batch, LEARNING_RATE, no_limits(r.world.device))))
    return losses


def curve(place: Place, config: RunConfig, num_steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and whole parameters after the steps."""
    with rig(place, config) as r:
        losses = train(r, range(num_steps))
        return losses, r.engine.full_parameters()


def save(place: Place, config: RunConfig, folder: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train two steps, save, and train two more."""
    with rig(place, config) as r:
        train(r, range(2))
        dcp.save(r.engine.state_dict(), checkpoint_id=folder)
        losses = train(r, range(2, 4))
        return losses, r.engine.full_parameters()


def load(
    place: Place, config: RunConfig, folder: str, again: str
) -> tuple[list[float], dict[str, Tensor]]:
    """Load what ``save`` wrote, save it ``again``, and train the two steps that followed."""
    with rig(place, config) as r:
        restore(r, folder)
        dcp.save(r.engine.state_dict(), checkpoint_id=again)
        losses = train(r, range(2, 4))
        return losses, r.engine.full_parameters()


def start(place: Place, config: RunConfig) -> str:
    """Digest of the start values under their names."""
    with rig(place, config) as r:
        return digest(r.engine.full_parameters())
