"""A pipeline stage in DeepSpeed's hands: the module around it and the engine that runs it.

Imports DeepSpeed, so it is imported where that is known to be installed.

Invariant: DeepSpeed moves hidden states and sums gradients over data ranks. It loads no batch: each
rank has all its rows, and a stage runs the micro-batches in their order. Its instruction to step
does nothing; ``step`` is called after the norm is known.

    engine = pipe(stage, optimizer, settings, world)
    engine.run(batch, training=True)
    engine.step()
"""

from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from llmtrain.data.batch import StepBatch
from llmtrain.hang.heartbeat import Heartbeat, Phase
from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule, batch_fields


def pipe(
    stage: StageModule, optimizer: torch.optim.Optimizer, settings: dict[str, Any], world: World
) -> "StageEngine":
    """Hand this rank's stage, and the optimizer of its parameters, to DeepSpeed; collective."""
    here, stages = world.pp_rank, range(world.axes.pp)
    module = PipelineModule(
        [Layer(stage) if number == here else nn.Identity() for number in stages],
        topology=PipeDataParallelTopology(num_pp=len(stages), num_dp=world.dp_size),
        partition_method="uniform",
    )
    grid = module.mpu()
    engine = StageEngine(
        args=None,
        model=module,
        optimizer=optimizer,
        mpu=grid,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, grid),
    )
    engine.beat = world.beat
    return engine


class Layer(nn.Module):
    """A stage as PipelineModule wants it: tokens or hidden in, hidden or the loss out."""

    def __init__(self, stage: StageModule) -> None:
        """Wrap ``stage``; ``fields`` are those of the micro-batch it runs next."""
        super().__init__()
        self.stage = stage
        self.fields: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Run tokens [B, S] or hidden [B, S, D] to hidden, or to the loss, [1]."""
        output: Tensor = self.stage(x, **self.fields)
        return output


class StageEngine(PipelineEngine):  # type: ignore[misc]
    """DeepSpeed's 1F1B, fed by number and stopped before the update."""

    beat: Heartbeat
    """Told what the stage does; between two instructions it waits for its neighbours."""

    _parts: list[StepBatch]
    _next = 0
    _shape: torch.Size | None = None

    def run(self, batch: StepBatch, training: bool) -> None:
        """Run all micro-batches; in training gradients are then averaged over the data ranks."""
        self._parts, self._next = batch.microbatches(), 0
        shape = self._parts[0].tokens.shape
        if shape != self._shape:
            self.reset_activation_shape()
            self._shape = shape
        self.module.train(training)
        self.total_loss, self._compute_loss = None, True
        self.micro_batches = len(self._parts)
        plan = self._train_schedule() if training else self._inference_schedule(len(self._parts))
        with torch.set_grad_enabled(training):
            self._exec_schedule(plan)

    def step(self, lr_kwargs: Any = None) -> None:
        """Update with the gradients as they are now."""
        super()._exec_optimizer_step(lr_kwargs)

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        """Give the first stage its tokens; the last one finds its targets among the fields."""
        if self.is_first_stage():
            self.pipe_buffers["inputs"][buffer_id] = self._parts[self._next].tokens

    def _exec_forward_pass(self, buffer_id: int) -> None:
        """Forward the next micro-batch."""
        (layer,) = self.module.forward_funcs
        layer.fields = batch_fields(self._parts[self._next])
        self._next += 1
        training = self.module.training
        self.beat.at(Phase.FORWARD if training else Phase.EVALUATE, self._next)
        super()._exec_forward_pass(buffer_id)
        self.beat.at(Phase.COLLECTIVE if training else Phase.EVALUATE, self._next)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """Backward the next micro-batch whose forward is done."""
        self.beat.at(Phase.BACKWARD, buffer_id + 1)
        super()._exec_backward_pass(buffer_id)
        self.beat.at(Phase.COLLECTIVE, buffer_id + 1)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        """Leave parameters and gradients as they are; see ``step``."""

    _INSTRUCTION_MAP = {  # noqa: RUF012 (overrides DeepSpeed's)
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_load_micro_batch,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.OptimizerStep: _exec_optimizer_step,
    }
