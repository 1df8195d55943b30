"""A run over ramps of batch and sequence length, and the losses of documents on the way."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from llmtrain.config.ramp import BatchStage, LengthStage
from llmtrain.config.run import RunConfig
from llmtrain.config.training import MonitorConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import rank_rows, synthetic_batch
from llmtrain.engine.portion import Portion
from llmtrain.engine.protocol import Engine, StepResult
from llmtrain.engine.step import no_limits
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from llmtrain.train.document_losses import DocumentLosses
from tests.distributed.layouts import LEARNING_RATE, SHAPE, Layout
from tests.distributed.rig import loss_of, rig_in

STEPS = 5
SAVED = 2
"""Steps done when the state is kept; the batch has grown before, the rows grow after."""
CHOSEN = (2, 4)
"""Steps whose documents' losses are written, counted from 1."""
SOURCES = ("code", "web")


def ramped_config(layout: Layout) -> RunConfig:
    """The run of ``layout`` with steps of 4 x 8, 4 x 16, 8 x 16, 8 x 32 and 8 x 32: windows of
    which each gives rows of so many tokens."""
    whole, unit = layout.config, SHAPE.sequence_length
    small = SHAPE.rows // 2 * unit
    training = replace(
        whole.training,
        micro_batch_size=1,
        batch_ramp=(BatchStage(until_tokens=2 * small, global_batch_tokens=small),),
        length_ramp=(
            LengthStage(until_tokens=small, sequence_length=unit // 4),
            LengthStage(until_tokens=4 * small, sequence_length=unit // 2),
        ),
    )
    return replace(whole, training=training)


@dataclass(frozen=True)
class RampBatches:
    """The rows of a rank at every step of a run's ramps."""

    config: RunConfig
    world: World

    def at(self, step: int) -> StepBatch:
        training = self.config.training
        shape = training.steps.shape(step)
        cuts = training.sequence_length // shape.sequence_length
        size = replace(SHAPE, rows=shape.num_units * cuts, sequence_length=shape.sequence_length)
        whole = synthetic_batch(size, seed=3, step=step)
        micro = training.micro_batch_size * cuts
        return rank_rows(whole, self.world.dp_rank, self.world.dp_size, micro)


@dataclass(frozen=True)
class Ramped:
    """What a run over ramps gave; every rank has the same."""

    losses: list[float]
    grad_norms: list[float]
    tail: list[float]
    """Losses after a new engine took over the state kept after SAVED steps."""
    sums: dict[int, tuple[float, float]]
    """Loss sum and targets of each chosen step."""


def ramped(place: Place, config: RunConfig, folder: str) -> Ramped:
    """Run all steps, writing the losses of documents, and the last ones again from the state."""
    results: list[StepResult] = []
    monitor = MonitorConfig(document_loss_steps=CHOSEN)
    with World(config.parallel, config.engine, place) as world:
        documents = DocumentLosses(Path(folder), world, SOURCES, monitor)
        batches, limits = RampBatches(config, world), no_limits(world.device)
        progress = Progress(num_steps=STEPS, steps=config.training.steps)
        with rig_in(world, config, documents.observe) as r:
            source = documents.asking(batches)
            while not progress.finished:
                if progress.step == SAVED:
                    state = kept(r.engine)
                results.append(r.engine.train_step(source.at(progress.step), LEARNING_RATE, limits))
                progress.advance()
                documents.after_step(progress, results[-1])
        with rig_in(world, config) as r:
            r.engine.load_state_dict(state)
            tail = [
                loss_of(r.engine.train_step(batches.at(step), LEARNING_RATE, limits))
                for step in range(SAVED, STEPS)
            ]
    chosen = {number: results[number - 1] for number in CHOSEN}
    return Ramped(
        losses=[loss_of(result) for result in results],
        grad_norms=[result.grad_norm.item() for result in results],
        tail=tail,
        sums={n: (x.loss_sum.item(), x.target_tokens.item()) for n, x in chosen.items()},
    )


def kept(engine: Engine) -> dict[str, Tensor]:
    """Copy an engine's state, as a checkpoint would keep it."""
    return {
        name: Portion(tuple(tensor.shape), [(r, v.clone()) for r, v in tensor.chunks], like=tensor)
        if isinstance(tensor, Portion)
        else tensor.clone()
        for name, tensor in engine.state_dict().items()
    }
