"""The engine on DeepSpeed's pipeline, under ZeRO 0 or 1; see engine.protocol.Engine.

Invariant: a stage is the StageModule that the native engine runs and the layers are split by the
same plan, so the model and the loss are the same; all but the forward and the backward is that of
the engine without a pipeline.

    engine = make_pipeline_engine(parts, world)
    result = engine.train_step(batch, lr=3e-4, limits=no_limits(world.device))
"""

from typing import Any

import torch
from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.engine.deepspeed.build import build_zero_model
from llmtrain.engine.deepspeed.zero import ZeroEngine
from llmtrain.engine.protocol import EngineParts
from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule


def make_pipeline_engine(parts: EngineParts, world: World) -> "PipelineZeroEngine":
    """Make the engine of this rank; collective.

    Raises:
        ConfigError: DeepSpeed is not installed.
        LayoutError: the optimizer needs whole matrices, which ZeRO does not keep.
    """
    return PipelineZeroEngine(build_zero_model(parts, world, _pipe), world, parts.grad_clip_norm)


def _pipe(
    stage: StageModule, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World
) -> Any:
    from llmtrain.engine.deepspeed.stage import pipe  # it imports DeepSpeed

    return pipe(stage, optimizer, settings, world)


class PipelineZeroEngine(ZeroEngine):
    """Steps of one model on the stages of a pipeline."""

    def _run(self, batch: StepBatch, scale: Tensor | None, training: bool) -> None:
        """Run all micro-batches; in training gradients are then averaged over the data ranks."""
        self._module.scale, self._module.totals = scale, {}
        self._deepspeed.run(batch, training)
