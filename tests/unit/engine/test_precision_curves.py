"""Losses on real text: every lower precision against fp32, from the same start on the same batches.

python -m tests.unit.engine.test_precision_curves 64         # the tables of docs/precision.md
python -m tests.unit.engine.test_precision_curves 64 3e-3
"""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.training import OptimizerConfig
from llmtrain.data.batch import StepBatch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss

MODEL = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
PARALLEL = ParallelConfig(dp_shard=1)
ROWS, LENGTH, LR, SEED = 8, 64, 1e-3, 5
NUM_STEPS, WARMUP = 24, 16
LARGEST, LAST = 0.0012, 0.0005
"""Relative differences to fp32 that a step, and the mean of the last ten, may have.

Losses fall by a quarter in these steps; rounding moves single steps by 0.04 % at most, and the mean
by 0.015 %. What is broken moves them further: plain rounding of bf16 parameters (mean 0.12 %),
fp8 scales twice too large (a step 0.43 %), weight gradients doubled (0.30 %), outputs doubled
(1.9 %).
"""
CPU = torch.device("cpu")

BF16 = {"precision": "bf16"}
OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 products, fp32 masters": BF16,
    "fp8 tensorwise": {**BF16, "fp8": "tensorwise"},
    "fp8 rowwise": {**BF16, "fp8": "rowwise"},
    "bf16 moments": {**BF16, "state_dtype": "bf16"},
    "no fp32 masters": {**BF16, "master_dtype": "bf16"},
    "no fp32 masters, bf16 moments": {**BF16, "master_dtype": "bf16", "state_dtype": "bf16"},
}
"""Rows of the table: fields of the engine, and of the optimizer."""
TESTED = [name for name in OPTIONS if name not in ("fp32", "bf16 moments", "no fp32 masters")]
"""The last row is both of those that are left out."""


@cache
def text() -> torch.Tensor:
    """The bytes of this project's licence."""
    path = Path(__file__).parents[3] / "LICENSE"
    return torch.from_numpy(np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int64))


def batch(step: int) -> StepBatch:
    """Windows of the text at places drawn for this step."""
    starts = np.random.default_rng([SEED, step]).integers(0, len(text()) - LENGTH, size=ROWS)
    windows = torch.stack([text()[start : start + LENGTH + 1] for start in starts.tolist()])
    return StepBatch(
        tokens=windows[:, :-1].contiguous(),
        targets=windows[:, 1:].contiguous(),
        positions=torch.arange(LENGTH, dtype=torch.int32).repeat(ROWS, 1),
        document_ids=torch.zeros(ROWS, LENGTH, dtype=torch.int32),
        loss_weight=torch.ones(ROWS, LENGTH),
        source_ids=torch.zeros(ROWS, dtype=torch.int32),
        num_microbatches=1,
    )


@cache
def curve(option: str, num_steps: int = NUM_STEPS, rate: float = LR) -> np.ndarray:
    """Mean losses of the steps."""
    fields = dict(OPTIONS[option])
    optimizer = OptimizerConfig(lr=rate, state_dtype=fields.pop("state_dtype", "fp32"))
    config = EngineConfig(device="cpu", **fields)
    with World(PARALLEL, config, Place()) as world:
        engine = make_engine(
            MODEL, PARALLEL, config, world, seed=SEED, loss=pretraining_loss(1, 512),
            optimizer_factory=optimizer_factory(optimizer, SEED), grad_clip_norm=1.0,
        )  # fmt: skip
        results = [
            engine.train_step(batch(step), rate * min(1.0, (step + 1) / WARMUP), no_limits(CPU))
            for step in range(num_steps)
        ]
        engine.close()
    return np.array([(r.loss_sum / r.target_tokens).item() for r in results])


def differences(
    option: str, num_steps: int = NUM_STEPS, rate: float = LR
) -> tuple[float, float, float]:
    """Last loss (mean of ten steps), its relative difference to fp32, the largest of any step."""
    mine, fp32 = curve(option, num_steps, rate), curve("fp32", num_steps, rate)
    last, want = mine[-10:].mean(), fp32[-10:].mean()
    return float(last), float(last / want - 1), float(np.abs(mine / fp32 - 1).max())


def test_the_reference_learns() -> None:
    losses = curve("fp32")
    assert losses[0] > 4.8
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("option", TESTED)
def test_losses_are_those_of_fp32(option: str) -> None:
    _, last, largest = differences(option)
    assert abs(last) < LAST
    assert largest < LARGEST


if __name__ == "__main__":
    steps, peak = int(sys.argv[1]), float(sys.argv[2]) if sys.argv[2:] else LR
    for name in OPTIONS:
        final, relative, worst = differences(name, steps, peak)
        print(f"| {name} | {final:.4f} | {100 * relative:+.2f} % | {100 * worst:.2f} % |")
