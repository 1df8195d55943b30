"""Pipeline parallelism: one stage per rank, GPipe or 1F1B, through torch.distributed.pipelining.

Invariant: shapes and dtypes of what stages exchange are computed from the batch, never asked from
a peer; gradients are sums over micro-batches (``scale_grads=False``), the loss carries the scale.

    pipeline = Pipeline(stage_module, world, "1f1b", hidden_size=128, dtype=torch.float32)
    pipeline.run(batch, training=True)
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from llmtrain.data.batch import StepBatch
from llmtrain.errors import LayoutError
from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule, batch_fields

SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
}
"""Schedules by ``parallel.schedule``."""

_Key = tuple[int, int, int, bool]


class Pipeline:
    """Runs the micro-batches of a step through the stages; every rank of ``pp`` calls it alike."""

    def __init__(
        self, stage: StageModule, world: World, schedule: str, hidden_size: int, dtype: torch.dtype
    ) -> None:
        """Take this rank's part; ``dtype`` is that of the hidden states between stages."""
        self._stage = stage
        self._world = world
        self._schedule = schedule
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._cache: dict[_Key, PipelineScheduleSingle] = {}

    def run(self, batch: StepBatch, training: bool) -> None:
        """Run forward and, in training, backward of all micro-batches.

        Raises:
            LayoutError: there are fewer micro-batches than stages, or they are uneven.
        """
        schedule = self._prepared(batch, training)
        inputs = (batch.tokens,) if self._world.is_first_stage else ()
        fields: dict[str, Any] = batch_fields(batch)
        if not training:
            schedule.eval(*inputs, **fields)
        elif self._world.is_last_stage:
            schedule.step(*inputs, target=batch.targets, return_outputs=False, **fields)
        else:
            schedule.step(*inputs, return_outputs=False, **fields)

    def _prepared(self, batch: StepBatch, training: bool) -> PipelineScheduleSingle:
        rows, length = batch.tokens.shape
        count = batch.num_microbatches
        if rows % count:
            raise LayoutError(
                f"{rows} rows do not split into {count} equal micro-batches; "
                "change training.global_batch_tokens or micro_batch_size"
            )
        if training and count < self._world.axes.pp:
            raise LayoutError(
                f"{count} micro-batches cannot fill parallel.pp={self._world.axes.pp} stages; "
                "raise training.global_batch_tokens or lower training.micro_batch_size"
            )
        key = (count, rows // count, length, training)
        if key not in self._cache:
            self._cache[key] = self._build(*key)
        return self._cache[key]

    def _build(self, count: int, rows: int, length: int, training: bool) -> PipelineScheduleSingle:
        world = self._world
        hidden = torch.empty(
            rows, length, self._hidden_size,
            dtype=self._dtype, device="meta", requires_grad=training,
        )  # fmt: skip
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        loss_dtype = torch.promote_types(self._dtype, torch.float32)
        loss = torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=training)
        stage = PipelineStage(
            self._stage,
            stage_index=world.pp_rank,
            num_stages=world.axes.pp,
            device=world.device,
            input_args=tokens if world.is_first_stage else hidden,
            output_args=loss if world.is_last_stage else hidden,
            group=world.group("pp"),
        )
        options: dict[str, Any] = {"loss_fn": _loss_is_output if training else None}
        return SCHEDULES[self._schedule if training else "gpipe"](
            stage, n_microbatches=count, scale_grads=False, **options
        )


def _loss_is_output(output: Tensor, target: Tensor) -> Tensor:
    """Take what the last stage returned; the targets already went into it."""
    del target
    return output.sum()
