"""An engine in one layout and its batches, and what ranks do with them in the parity suite.

outcome = ranks.run(exercise, layout.config, size=layout.size)[0]
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmtrain.config.run import RunConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import rank_rows, synthetic_batch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.portion import Portion
from llmtrain.engine.protocol import Engine, StepLimits, StepResult
from llmtrain.engine.step import no_limits
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import Observer, pretraining_loss
from tests.distributed.layouts import LEARNING_RATE, NUM_STEPS, SHAPE


@dataclass
class Rig:
    """An engine in one layout and its batches."""

    config: RunConfig
    world: World
    engine: Engine

    def batch(self, step: int) -> StepBatch:
        whole = synthetic_batch(SHAPE, seed=3, step=step)
        micro = self.config.training.micro_batch_size
        return rank_rows(whole, self.world.dp_rank, self.world.dp_size, micro)

    def step(self, number: int, lr: float = LEARNING_RATE) -> StepResult:
        return self.engine.train_step(self.batch(number), lr, no_limits(self.world.device))

    def train(self, steps: range, lr: float = LEARNING_RATE) -> list[float]:
        return [loss_of(self.step(number, lr)) for number in steps]


def loss_of(result: StepResult) -> float:
    return (result.loss_sum / result.target_tokens).item()


@contextmanager
def rig_in(world: World, config: RunConfig, observe: Observer | None = None) -> Iterator[Rig]:
    engine = make_engine(
        config.model, config.parallel, config.engine, world, seed=config.training.seed,
        loss=pretraining_loss(
            SHAPE.num_sources, config.engine.loss_chunk_tokens, observe=observe
        ),
        optimizer_factory=optimizer_factory(config.optimizer, config.training.seed),
        grad_clip_norm=1.0,
    )  # fmt: skip
    yield Rig(config, world, engine)
    engine.close()


@contextmanager
def rig(place: Place, config: RunConfig) -> Iterator[Rig]:
    with World(config.parallel, config.engine, place) as world, rig_in(world, config) as made:
        yield made


@dataclass(frozen=True)
class Numbers:
    """Loss and whole gradients of the first step; gradients from rank 0 alone."""

    loss: float
    gradients: dict[str, Tensor] = field(compare=False)


@dataclass(frozen=True)
class Outcome:
    """All that a layout shows; every rank has the same but for gradients."""

    start: str
    """Digest of the starting parameters."""
    held_out: float
    """Loss of the first batch by eval_step, before any update."""
    first: Numbers
    losses: list[float]
    """Of all steps and, after a refused one, one more."""
    grad_norms: list[float]
    source_losses: list[float]
    refused: bool
    """Whether the step that was to be refused was, and left every bit as it was."""
    fp64: Numbers | None
    """The same first step in double precision, where the engine has it."""


def exercise(
    place: Place, config: RunConfig, reason: str = "not finite", num_steps: int = NUM_STEPS
) -> Outcome:
    """Start values, evaluation, gradients, steps, a refused step, and fp64, in one world."""
    with World(config.parallel, config.engine, place) as world:
        with rig_in(world, config) as r:
            start = digest(r.engine.full_parameters())
            evaluated = r.engine.eval_step(r.batch(0))
            assert not evaluated.applied.item()
            results = [r.step(0)]
            gradients = r.engine.gradients()
            results += [r.step(number) for number in range(1, num_steps)]
            refused = _refuses(r, reason)
            results.append(r.step(num_steps))
            assert all(result.applied.item() for result in results)
        fp64 = None
        if config.engine.kind == "native" and config.engine.precision == "fp32":
            fp64 = _in_double(world, config)
    return Outcome(
        start=start,
        held_out=loss_of(evaluated),
        first=Numbers(loss_of(results[0]), gradients if place.rank == 0 else {}),
        losses=[loss_of(result) for result in results],
        grad_norms=[result.grad_norm.item() for result in results],
        source_losses=[
            (x.metrics["source_loss_sum"] / x.metrics["source_tokens"])[1].item() for x in results
        ],
        refused=refused,
        fp64=fp64,
    )


def _in_double(world: World, config: RunConfig) -> Numbers:
    exact = replace(config, engine=replace(config.engine, precision="fp64"))
    with rig_in(world, exact) as r:
        loss = loss_of(r.step(0))
        gradients = r.engine.gradients()
        return Numbers(loss, gradients if world.rank == 0 else {})


REASONS = ("not finite", "loss", "grad_norm")
"""Why a step may be refused."""


def _refuses(r: Rig, reason: str) -> bool:
    """Try a step that must be refused; whether it was, with every bit of the state as before."""
    before = snapshot(r.engine)
    batch, limits = bad_step(r, reason)
    result = r.engine.train_step(batch, LEARNING_RATE, limits)
    after = snapshot(r.engine)
    same = before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    return same and not result.applied.item()


def bad_step(r: Rig, reason: str) -> tuple[StepBatch, StepLimits]:
    """A batch and limits with which a step is refused for ``reason``."""
    batch, limits = r.batch(1), no_limits(r.world.device)
    if reason == "not finite":
        return replace(batch, loss_weight=batch.loss_weight * math.nan), limits
    if reason == "loss":
        return batch, replace(limits, max_loss=torch.tensor(0.5))
    return batch, replace(limits, max_grad_norm=torch.tensor(1e-6))


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Copy the tensors this rank holds."""
    views = {}
    for name, tensor in engine.state_dict().items():
        chunks = tensor.chunks if isinstance(tensor, Portion) else [((), tensor)]
        views |= {f"{name}{region}": view.clone() for region, view in chunks}
    return views


def digest(tensors: dict[str, Tensor]) -> str:
    """Hash names, shapes and bits."""
    whole = hashlib.blake2b()
    for name in sorted(tensors):
        whole.update(f"{name}{tuple(tensors[name].shape)}".encode())
        whole.update(tensors[name].contiguous().numpy().tobytes())
    return whole.hexdigest()


def relative(got: list[float], want: list[float]) -> float:
    """Largest relative difference of two lists; infinite where one is no number."""
    errors = [abs(g - w) / abs(w) for g, w in zip(got, want, strict=True)]
    return max(math.inf if math.isnan(error) else error for error in errors)
