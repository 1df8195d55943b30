"""A preference run on ranks: its reference, its first steps and their gradients.

outcome = ranks.run(prefer, layout.config, folder, size=layout.size)[0]
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from llmtrain.build import engine_of
from llmtrain.config.data import DataConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import EvaluationConfig
from llmtrain.data.loader import Batches
from llmtrain.data.pairs import FloatArray
from llmtrain.data.plan import plan_of
from llmtrain.data.store import open_sources
from llmtrain.engine.step import no_limits
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.reference import preferences_of
from tests.distributed.rig import loss_of

NUM_STEPS = 4
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Preferred:
    """What a layout shows; every rank has the same."""

    reference: FloatArray
    losses: list[float]
    margins: list[float]
    pairs: list[float]
    gradients: dict[str, Tensor]
    """Of the second step: in the first every margin is 0."""
    held_out: dict[str, dict[str, float]]
    """After the last step."""


def configured(config: RunConfig, folder: Path) -> RunConfig:
    """A run of ``config`` on the pairs in ``folder``."""
    return replace(
        config,
        training=replace(config.training, objective="dpo"),
        data=DataConfig(
            sources={"pairs": str(folder / "pairs")}, validation={"held": str(folder / "held")},
            packing="best_fit",
        ),
        evaluation=EvaluationConfig(every_steps=1),
    )  # fmt: skip


def prefer(place: Place, config: RunConfig, folder: Path) -> Preferred:
    """Ask the reference, then train."""
    config = configured(config, folder)
    with World(config.parallel, config.engine, place) as world:
        plan = plan_of(config, open_sources(config.data.sources))
        run = folder / f"run-{world.world_size}"
        preferences = preferences_of(config, plan, world, run, lambda *_: None)
        assert preferences is not None
        assert preferences.held_out is not None
        engine = engine_of(config, world, 1, preferences.observe)
        preferences.open(engine, None, 0)
        batches = Batches(
            plan, dp_rank=world.dp_rank, dp_size=world.dp_size, parallel=config.parallel,
            micro_batch_size=config.training.micro_batch_size, prefetch=0,
            pairs=preferences.sources,
        )  # fmt: skip
        results, gradients = [], dict[str, Tensor]()
        for step in range(NUM_STEPS):
            limits = no_limits(world.device)
            results.append(engine.train_step(batches.at(step), LEARNING_RATE, limits))
            if step == 1:
                gradients = engine.gradients()
        evaluation = Evaluation(
            engine, preferences.held_out, world.device, every_steps=1, report=None
        )
        held_out = evaluation.run(lambda: False)
        assert held_out is not None
        reference = preferences.sources[0].reference
        engine.close()
    assert reference is not None
    assert np.all(reference < 0)
    return Preferred(
        reference=reference,
        losses=[loss_of(one) for one in results],
        margins=[
            (one.metrics["pair_chosen_reward_sum"] - one.metrics["pair_rejected_reward_sum"]).item()
            for one in results
        ],
        pairs=[one.target_tokens.item() for one in results],
        gradients=gradients if place.rank == 0 else {},
        held_out=held_out,
    )
