"""What ranks do in the tests of adapters."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.run import RunConfig
from llmtrain.config.training import CheckpointConfig
from llmtrain.engine.native import NativeEngine
from llmtrain.engine.protocol import Engine
from llmtrain.model.adapter import LORA_B
from llmtrain.model.init import initialize_
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from tests.distributed.layouts import SEED, Layout
from tests.distributed.rig import loss_of, rig

LORA = AdapterConfig(rank=3, alpha=6.0)
"""A rank that shards and tensor parallelism do not divide."""


@dataclass(frozen=True)
class Trained:
    """What a layout shows of a model with an adapter; gradients and parameters from rank 0."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    holders: list[str]
    """Names with a gradient after a step, as the modules have them."""
    states: int
    """Parameters the optimizer keeps anything for."""


def adapted(layout: Layout, adapter: AdapterConfig = LORA) -> RunConfig:
    """The configuration of a row, with an adapter."""
    config = layout.config
    return replace(config, model=replace(config.model, adapter=adapter))


def fill_b(engine: Engine, config: RunConfig) -> None:
    """Give every B values, as if it had been trained: at zero the gradients of A are zero."""
    state = engine.state_dict()
    for name, value in state.items():
        if name.startswith("model.") and name.endswith(LORA_B):
            whole = torch.empty(tuple(value.shape))
            slices = tuple(slice(0, size) for size in whole.shape)
            stand_in = name.removesuffix(LORA_B) + ".weight"
            initialize_(whole, stand_in, tuple(whole.shape), slices, config.model, SEED)
            state[name] = whole.to(value.dtype)
    engine.load_state_dict(state)


def train(place: Place, config: RunConfig, num_steps: int) -> Trained:
    """Take steps from values of B that are not zero."""
    with rig(place, config) as r:
        fill_b(r.engine, config)
        first = r.step(0)
        gradients = r.engine.gradients()
        results = [first, *(r.step(number) for number in range(1, num_steps))]
        assert isinstance(r.engine, NativeEngine)
        modules = r.engine._local.modules
        holders = [
            name for module in modules for name, p in module.named_parameters()
            if p.grad is not None
        ]  # fmt: skip
        state = [one for one in r.engine._optimizer.state.values() if one]
        parameters = r.engine.full_parameters()
        mine = place.rank == 0
        return Trained(
            losses=[loss_of(result) for result in results],
            norms=[result.grad_norm.item() for result in results],
            gradients=gradients if mine else {},
            parameters=parameters if mine else {},
            holders=holders,
            states=len(state),
        )


def go_on(place: Place, config: RunConfig, folder: str, steps: range) -> list[float]:
    """Restore where there is something to, take ``steps``, save."""
    with rig(place, config) as r:
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(), r.engine, facts={})
        progress = Progress(num_steps=100, steps=config.training.steps)
        if not checkpoints.restore(progress):
            fill_b(r.engine, config)
        assert progress.step == steps.start
        found = r.train(steps)
        progress.step = steps.stop
        assert checkpoints.save(progress)
        assert checkpoints.wait()
        checkpoints.close()
        return found
