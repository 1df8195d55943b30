"""Makes the engine that ``engine.kind`` names.

Invariant: what runs a step is decided here and nowhere else.

    engine = make_engine(
        config.model, config.parallel, config.engine, world, seed=0, loss=loss,
        optimizer_factory=optimizer_factory(config.optimizer), grad_clip_norm=1.0,
    )
"""

from collections.abc import Callable

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.engine.protocol import Engine, EngineParts, LossFunction, OptimizerFactory
from llmtrain.errors import ConfigError
from llmtrain.parallel.mesh import World


def _native(parts: EngineParts, world: World) -> Engine:
    from llmtrain.engine.native import NativeEngine
    from llmtrain.parallel.apply import build_local_model

    local = build_local_model(
        parts.model, parts.parallel, parts.engine, world, parts.seed, parts.loss
    )
    return NativeEngine(
        local, parts.optimizer_factory, parts.grad_clip_norm, parts.update_in_backward
    )


def _deepspeed(parts: EngineParts, world: World) -> Engine:
    if parts.parallel.pp > 1:
        from llmtrain.engine.deepspeed.pipeline import make_pipeline_engine

        return make_pipeline_engine(parts, world)
    from llmtrain.engine.deepspeed.zero import make_zero_engine

    return make_zero_engine(parts, world)


ENGINES: dict[str, Callable[[EngineParts, World], Engine]] = {
    "native": _native,
    "deepspeed": _deepspeed,
}
"""Makers by ``engine.kind``; each imports what it alone needs."""


def make_engine(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
    *,
    seed: int,
    loss: LossFunction,
    optimizer_factory: OptimizerFactory,
    grad_clip_norm: float,
    update_in_backward: bool = False,
) -> Engine:
    """Make the engine of this rank; collective.

    Raises:
        ConfigError: ``engine.kind`` is not in ENGINES, or its package is not installed.
        LayoutError: the model does not fit the layout.
    """
    if engine.kind not in ENGINES:
        raise ConfigError(f"engine.kind={engine.kind} is not one of {sorted(ENGINES)}")
    parts = EngineParts(
        model=model, parallel=parallel, engine=engine, seed=seed, loss=loss,
        optimizer_factory=optimizer_factory, grad_clip_norm=grad_clip_norm,
        update_in_backward=update_in_backward,
    )  # fmt: skip
    return ENGINES[engine.kind](parts, world)
