"""``llmtrain parity``: a layout against one device, by losses and by every gradient.

Both sides start from the same seed and see the same synthetic batches (several documents per row,
uneven masks); the layout's ranks are started here unless a launcher has done so. The reference is
the native engine in one process, with the same optimizer and precision. Losses are compared at
every step; gradients at the first: later ones belong to parameters that rounding has moved apart,
and an optimizer that divides by small moments makes much of little. The error of a
gradient is ||g - reference|| / ||reference||, taken against the global norm instead where the
reference is below 1e-6 of it (a key bias, say, whose gradient is zero but for rounding).

Invariant: the exit status is 1 if any number is beyond the tolerance or not finite.

    llmtrain parity parallel.pp=2 parallel.schedule=zbv engine.precision=fp64 tolerance=1e-12
    llmtrain parity parallel.pp=2 engine.kind=deepspeed steps=20
"""

import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.config.commands import ParityConfig
from llmtrain.config.engine import DeepSpeedConfig
from llmtrain.config.parallel import ParallelConfig, implied_world_size
from llmtrain.config.run import check
from llmtrain.config.strict import show
from llmtrain.data.synthetic import BatchShape, rank_rows, synthetic_batch
from llmtrain.engine.choose import make_engine
from llmtrain.engine.step import no_limits
from llmtrain.errors import LayoutError
from llmtrain.ops.kernels import choose_kernels
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.launch import run_ranks
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.loss import pretraining_loss

logger = logging.getLogger(__name__)

_SHOWN = 8
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """What one step gave: whole gradients on the CPU, by name."""

    loss: float
    """Mean loss in nats per target."""
    gradients: dict[str, Tensor]
    """Gradients before clipping; of the first step, empty in others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Error of one quantity at one step."""

    name: str
    """Parameter, or ``loss``."""
    step: int
    """Optimizer step, from 1."""
    error: float
    """Relative error."""
    norm: float
    """Size of the reference."""


def main(config: ParityConfig) -> int:
    """Run both sides, print the worst parameters; 0 within ``config.tolerance``, else 1."""
    place = Place.from_environment()
    if config.data.sources and place.rank == 0:
        logger.info("parity makes its batches from training.seed: data.sources is not read")
    size = implied_world_size(config.parallel) if place.world_size == 1 else place.world_size
    logger.info("the layout: %d ranks, %s", size, _layout(config))
    if place.world_size > 1:
        requested = run_steps(config, place)
        if place.rank > 0:
            return 0
    else:
        requested = _run_started_here(config)
    logger.info("the reference: one process, engine.kind=native")
    reference = run_steps(_alone(config), Place())
    return _report(compare(requested, reference), config.tolerance)


def _layout(config: ParityConfig) -> str:
    """The layout in the fields that differ from one process, for the log."""
    was, now = ParallelConfig(), config.parallel
    changed = [
        f"parallel.{f.name}={show(getattr(now, f.name))}"
        for f in fields(now)
        if getattr(now, f.name) != getattr(was, f.name)
    ]
    return ", ".join([f"engine.kind={config.engine.kind}", *changed])


def _alone(config: ParityConfig) -> ParityConfig:
    """The same run on the native engine in one process."""
    engine = replace(config.engine, kind="native", compile=False, deepspeed=DeepSpeedConfig())
    return replace(config, parallel=ParallelConfig(dp_shard=1), engine=engine)


def _run_started_here(config: ParityConfig) -> list[StepNumbers]:
    """Start as many ranks as the axes multiply to (``auto`` counts as 1); give rank 0's steps."""
    size = implied_world_size(config.parallel)
    check(config, size)
    if size == 1:
        return run_steps(config, Place())
    on_cuda = config.engine.device != "cpu" and torch.cuda.is_available()
    if on_cuda and torch.cuda.device_count() < size:
        raise LayoutError(
            f"the layout needs {size} GPUs, found {torch.cuda.device_count()}; "
            "use engine.device=cpu, or start the command under torchrun on more machines"
        )
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        run_ranks(_save_steps, size, Path(folder) / "store", config, folder)
        steps: list[StepNumbers] = torch.load(Path(folder) / "steps.pt", weights_only=False)
    return steps


def _save_steps(place: Place, config: ParityConfig, folder: str) -> None:
    steps = run_steps(config, place)
    if place.rank == 0:
        torch.save(steps, Path(folder) / "steps.pt")


def run_steps(config: ParityConfig, place: Place) -> list[StepNumbers]:
    """Train ``config.steps`` steps in ``config.parallel`` on synthetic batches."""
    training = config.training
    shape = BatchShape(
        rows=training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
    )
    steps = []
    with World(config.parallel, config.engine, place) as world:
        engine = make_engine(
            config.model, config.parallel, config.engine, world, seed=training.seed,
            loss=pretraining_loss(
                shape.num_sources, config.engine.loss_chunk_tokens, training.z_loss_weight,
                step=choose_kernels(config.engine.kernels, world.device).cross_entropy_step,
            ),
            optimizer_factory=optimizer_factory(config.optimizer, config.training.seed),
            grad_clip_norm=config.optimizer.grad_clip_norm,
            update_in_backward=config.optimizer.in_backward,
        )  # fmt: skip
        for step in range(config.steps):
            whole = synthetic_batch(shape, training.seed, step)
            mine = rank_rows(
                whole, world.dp_rank, world.dp_size, training.micro_batch_size, config.parallel
            )
            result = engine.train_step(
                mine.to(world.device), config.optimizer.lr, no_limits(world.device)
            )
            mean = (result.loss_sum / result.target_tokens).item()
            gradients = engine.gradients() if step == 0 else {}
            steps.append(StepNumbers(loss=mean, gradients=gradients))
        engine.close()
    return steps


def compare(requested: list[StepNumbers], reference: list[StepNumbers]) -> list[Difference]:
    """List the error of every step's loss and of every gradient, the worst first."""
    differences = []
    for number, (got, want) in enumerate(zip(requested, reference, strict=True), start=1):
        error = abs(got.loss - want.loss) / abs(want.loss)
        differences.append(Difference(name="loss", step=number, error=error, norm=want.loss))
        differences += compare_gradients(got.gradients, want.gradients, number)
    return sorted(differences, key=lambda d: (not math.isnan(d.error), -d.error))


def compare_gradients(
    got: Mapping[str, Tensor], want: Mapping[str, Tensor], step: int
) -> list[Difference]:
    """Compare two sets of whole gradients by name.

    Raises:
        LayoutError: one side has a parameter that the other lacks.
    """
    if set(got) != set(want):
        odd = sorted(set(got) ^ set(want))
        raise LayoutError(
            f"{len(odd)} parameters are on one side only, the first is {odd[0]}; the layout "
            "loses or renames parameters"
        )
    norms = {name: gradient.double().norm().item() for name, gradient in want.items()}
    whole = math.sqrt(sum(norm**2 for norm in norms.values()))
    differences = []
    for name, gradient in want.items():
        distance = (got[name].double() - gradient.double()).norm().item()
        norm = norms[name]
        against = norm if norm >= _NEGLIGIBLE * whole else whole
        error = distance / against if against > 0 else distance
        differences.append(Difference(name=name, step=step, error=error, norm=norm))
    return differences


def _report(differences: list[Difference], tolerance: float) -> int:
    losses = [d for d in differences if d.name == "loss"]
    gradients = [d for d in differences if d.name != "loss"]
    shown = sorted([*losses[:1], *gradients[:_SHOWN]], key=differences.index)
    width = max(len(d.name) for d in shown)
    lines = [f"{'parameter':<{width}}  step  relative error  norm of the reference"]
    lines += [f"{d.name:<{width}}  {d.step:>4}  {d.error:>14.3e}  {d.norm:>21.6e}" for d in shown]
    lines.append(
        f"losses of {len(losses)} steps: worst {losses[0].error:.3e} at step {losses[0].step}; "
        f"gradients: worst {gradients[0].error:.3e} at {gradients[0].name}"
    )
    worst = differences[0]
    lines.append(f"parity: worst {worst.error:.3e} at {worst.name}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if worst.error <= tolerance else 1
