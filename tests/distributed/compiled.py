"""Body that ranks run to count what compiled blocks compile over a run."""

from dataclasses import dataclass, replace

import torch
from torch._dynamo.utils import counters

from llmtrain.config.run import RunConfig
from llmtrain.data.synthetic import rank_rows, synthetic_batch
from llmtrain.engine.step import no_limits
from llmtrain.parallel import compile as blocks
from llmtrain.parallel import offload
from llmtrain.parallel.compile import num_compilations
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from tests.distributed.layouts import LEARNING_RATE, SHAPE
from tests.distributed.ramps import STEPS, RampBatches, kept
from tests.distributed.rig import rig_in
from tests.host_waits import as_copied


@dataclass(frozen=True)
class Counted:
    """Graphs compiled so far: after each step, after an evaluation, and at the end."""

    steps: list[int]
    evaluated: int
    end: int


def counted(place: Place, config: RunConfig, first: int) -> Counted:
    """Steps from ``first`` over ramps, an evaluation, other documents, and a second engine.

    Whatever follows the evaluation raises where it compiles, but in the second engine, which
    goes on from the state of the first.
    """
    before, blocks.BACKEND = blocks.BACKEND, "eager"
    small, offload.MIN_BYTES = offload.MIN_BYTES, 1
    torch._dynamo.reset()
    counters.clear()
    config = replace(config, engine=replace(config.engine, compile=True))
    try:
        with World(config.parallel, config.engine, place) as world:
            return _counted(config, world, range(first, STEPS))
    finally:
        blocks.BACKEND, offload.MIN_BYTES = before, small
        torch._dynamo.reset()


def _counted(config: RunConfig, world: World, numbers: range) -> Counted:
    batches, limits = RampBatches(config, world), no_limits(world.device)
    steps = []
    with rig_in(world, config) as r:
        for number in numbers:
            r.engine.train_step(as_copied(batches.at(number)), LEARNING_RATE, limits)
            steps.append(num_compilations())
        whole = synthetic_batch(SHAPE, seed=9, step=0)
        micro = config.training.micro_batch_size
        other = as_copied(rank_rows(whole, world.dp_rank, world.dp_size, micro))
        if numbers.start == 0:
            r.engine.eval_step(other)
        evaluated = num_compilations()
        state = kept(r.engine)
        with torch._dynamo.config.patch(error_on_recompile=True):
            r.engine.train_step(other, LEARNING_RATE, limits)
            if numbers.start == 0:
                r.engine.eval_step(other)
    with rig_in(world, config) as r:
        r.engine.load_state_dict(state)
        for number in numbers:
            r.engine.train_step(as_copied(batches.at(number)), LEARNING_RATE, limits)
    return Counted(steps, evaluated, num_compilations())
