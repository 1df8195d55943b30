"""Makes the engine that ``engine.kind`` names; what runs a step is decided here and nowhere else.

engine = make_engine(
config.model, config.parallel, config.engine, world, seed=0, loss=loss,
optimizer_factory=optimizer_factory(config.optimizer), grad_clip_norm=1.0,
)
"""

from collections.abc import Callable

from llmtrain.config.model import ModelConfig
from llmtrain.config.parallel import EngineConfig, ParallelConfig
from llmtrain.engine.protocol import Engine, LossFunction, OptimizerFactory
from llmtrain.errors import ConfigError
from llmtrain.parallel.mesh import World

EngineMaker = Callable[
    [
        ModelConfig,
        ParallelConfig,
        EngineConfig,
        World,
        int,
        LossFunction,
        OptimizerFactory,
        float,
    ],
    Engine,
]
"""(model, parallel, engine, world, seed, loss, optimizer factory, clip norm) -> engine."""


def _native(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
    seed: int,
    loss: LossFunction,
    optimizer_factory: OptimizerFactory,
    grad_clip_norm: float,
) -> Engine:
    from llmtrain.engine.native import NativeEngine
    from llmtrain.parallel.apply import build_local_model

    local = build_local_model(model, parallel, engine, world, seed, loss)
    return NativeEngine(local, optimizer_factory, grad_clip_norm)


def _deepspeed(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    world: World,
    seed: int,
    loss: LossFunction,
    optimizer_factory: OptimizerFactory,
    grad_clip_norm: float,
) -> Engine:
    make: EngineMaker
    if parallel.pp > 1:
        from llmtrain.engine.deepspeed_pipeline import make_pipeline_engine

        make = make_pipeline_engine
    else:
        from llmtrain.engine.deepspeed import make_zero_engine

        make = make_zero_engine
    return make(model, parallel, engine, world, seed, loss, optimizer_factory, grad_clip_norm)


ENGINES: dict[str, EngineMaker] = {"native": _native, "deepspeed": _deepspeed}
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
) -> Engine:
    """Make the engine of this rank; collective.

    Raises:
        ConfigError: ``engine.kind`` is not in ENGINES, or its package is not installed.
        LayoutError: the model does not fit the layout.
    """
    if engine.kind not in ENGINES:
        raise ConfigError(f"engine.kind={engine.kind} is not one of {sorted(ENGINES)}")
    make = ENGINES[engine.kind]
    return make(model, parallel, engine, world, seed, loss, optimizer_factory, grad_clip_norm)
