"""Pipeline parallelism: one or several stages per rank, through torch.distributed.pipelining.

Invariant: shapes and dtypes of what stages exchange are computed from the batch, never asked from
a peer; gradients are sums over micro-batches (``scale_grads=False``), the loss carries the scale,
and FSDP2 reduces them once, after the last backward of a stage. Evaluation runs any number of
micro-batches through the same stages, forward only.

    numbers = stages_of_rank("zbv", pp=4, pp_rank=world.pp_rank, stages_per_rank=2)
    pipeline = Pipeline(modules, numbers, 8, world, "zbv", hidden_size=128, dtype=torch.float32)
    pipeline.run(batch, training=True)
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from llmtrain.config.parallel import SEVERAL_STAGES, V_SCHEDULES
from llmtrain.data.batch import StepBatch
from llmtrain.errors import LayoutError
from llmtrain.hang.heartbeat import Heartbeat, Phase
from llmtrain.parallel.forward import forward_only
from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule, batch_fields

Schedule = PipelineScheduleSingle | PipelineScheduleMulti

SCHEDULES: Mapping[str, type[Any]] = {
    "gpipe": ScheduleGPipe,  # arXiv:1811.06965
    "1f1b": Schedule1F1B,  # arXiv:1806.03377, flushed after each step
    "interleaved_1f1b": ScheduleInterleaved1F1B,  # arXiv:2104.04473
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,  # arXiv:2401.10241, ZB1P
    "zbv": ScheduleZBVZeroBubble,  # arXiv:2401.10241, section 6
    "dualpipev": ScheduleDualPipeV,  # arXiv:2412.19437, folded in V order
}
"""Schedules by ``parallel.schedule``."""

_Key = tuple[int, int, int]


class Pipeline:
    """Runs the micro-batches of a step through the stages; every rank of ``pp`` calls it alike."""

    def __init__(
        self,
        modules: Sequence[StageModule],
        numbers: Sequence[int],
        num_stages: int,
        world: World,
        schedule: str,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """Take this rank's stages.

        Args:
            modules: the stages, in the order of the model.
            numbers: their numbers, as ``stages_of_rank`` gives them.
            num_stages: stages of the whole pipeline.
            world: groups; ``pp`` is above 1.
            schedule: a key of SCHEDULES.
            hidden_size: width of the hidden states between stages.
            dtype: type of the hidden states between stages.
        """
        self._modules = dict(zip(numbers, modules, strict=True))
        self._num_stages = num_stages
        self._world = world
        self._schedule = schedule
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._built: tuple[_Key, Schedule] | None = None

    def run(self, batch: StepBatch, training: bool) -> None:
        """Run forward and, in training, backward of all micro-batches.

        Raises:
            LayoutError: micro-batches are uneven, or in training too few or not whole rounds.
        """
        key = self._checked_key(batch)
        if not training:
            forward_only(
                self._modules, batch, self._world.group("pp"), self._schedule,
                self._num_stages, self._hidden(key),
            )  # fmt: skip
            return
        check_microbatches(self._schedule, self._world.axes.pp, batch.num_microbatches)
        inputs = (batch.tokens,) if 0 in self._modules else ()
        fields: dict[str, Any] = batch_fields(batch)
        if self._num_stages - 1 in self._modules:
            fields["target"] = batch.targets
        self._schedule_of(key).step(*inputs, return_outputs=False, **fields)

    def _schedule_of(self, key: _Key) -> Schedule:
        """Give the schedule of a shape, made where the step before had another.

        The last one alone is kept: each holds a buffer for every micro-batch, and the stages of a
        ramp do not come back.
        """
        if self._built is None or self._built[0] != key:
            self._built = None  # frees its buffers first
            self._built = key, self._build(key)
        return self._built[1]

    def _checked_key(self, batch: StepBatch) -> _Key:
        """Give the number of micro-batches, the rows and the local length of each."""
        rows, length = batch.tokens.shape
        count, tp = batch.num_microbatches, self._world.axes.tp
        if rows % count:
            raise LayoutError(
                f"{rows} rows do not split into {count} equal micro-batches; "
                "change training.global_batch_tokens or micro_batch_size"
            )
        if length % tp:
            raise LayoutError(
                f"parallel.tp={tp} does not divide the {length} positions of a context-parallel "
                "rank; use a sequence_length that tp x cp divides"
            )
        return count, rows // count, length

    def _hidden(self, key: _Key) -> Tensor:
        """Describe on the meta device what goes from one stage to the next, [B, S / tp, D]."""
        _, rows, length = key
        return torch.empty(
            rows, length // self._world.axes.tp, self._hidden_size,
            dtype=self._dtype, device="meta",
        )  # fmt: skip

    def _build(self, key: _Key) -> Schedule:
        count, rows, length = key
        hidden = self._hidden(key).requires_grad_()
        tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
        loss_dtype = torch.promote_types(self._dtype, torch.float32)
        loss = torch.empty(1, dtype=loss_dtype, device="meta", requires_grad=True)
        stages = [
            _Stage(
                module,
                stage_index=number,
                num_stages=self._num_stages,
                device=self._world.device,
                input_args=tokens if number == 0 else hidden,
                output_args=loss if number == self._num_stages - 1 else hidden,
                group=self._world.group("pp"),
            )
            for number, module in self._modules.items()
        ]
        for stage in stages:
            stage.beat = self._world.beat
        schedule: Schedule = SCHEDULES[self._schedule](
            stages if self._schedule in SEVERAL_STAGES else stages[0],
            n_microbatches=count,
            loss_fn=_loss_is_output,
            scale_grads=False,
        )
        return schedule


def check_microbatches(schedule: str, pp: int, count: int) -> None:
    """Refuse what a schedule cannot run.

    Raises:
        LayoutError: fewer micro-batches than a pass over the ranks holds (down and up in V order),
            or, interleaved, micro-batches that do not make equal rounds.
    """
    fewest = 2 * pp if schedule in V_SCHEDULES else pp
    if count < fewest:
        raise LayoutError(
            f"{count} micro-batches cannot fill parallel.pp={pp} with schedule={schedule}, which "
            f"takes at least {fewest}; raise training.global_batch_tokens or lower "
            "training.micro_batch_size"
        )
    rounds = count // pp
    if schedule.startswith("interleaved") and count % rounds:
        raise LayoutError(
            f"{count} micro-batches do not make {rounds} equal rounds of parallel.pp={pp} or more, "
            f"which schedule={schedule} takes; use a training.global_batch_tokens that gives a "
            f"multiple of {pp}"
        )


class _Stage(PipelineStage):
    """A stage whose gradients may be sent, and reach what waits for them where they come apart."""

    beat: Heartbeat
    """Told what the stage does; between two chunks it waits for its neighbours."""

    def forward_one_chunk(self, fwd_chunk_id: int, *rest: Any, **more: Any) -> Any:
        """Run the forward of a micro-batch."""
        self.beat.at(Phase.FORWARD, fwd_chunk_id + 1)
        output = super().forward_one_chunk(fwd_chunk_id, *rest, **more)
        self.beat.at(Phase.COLLECTIVE, fwd_chunk_id + 1)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *rest: Any, **more: Any) -> None:
        """Run the backward of a micro-batch."""
        self.beat.at(Phase.BACKWARD, bwd_chunk_id + 1)
        super().backward_one_chunk(bwd_chunk_id, *rest, **more)
        self.beat.at(Phase.COLLECTIVE, bwd_chunk_id + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Send the gradient of the input; gloo and NCCL take contiguous tensors alone."""
        gradients = self.bwd_cache.get(bwd_chunk_id, ())
        self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in gradients)
        return super().get_bwd_send_ops(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute the weight gradients of a micro-batch, then do what a whole backward does."""
        self.beat.at(Phase.BACKWARD, bwd_chunk_id + 1)
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        settle_gradients(self.submod)
        self.beat.at(Phase.COLLECTIVE, bwd_chunk_id + 1)


def settle_gradients(module: nn.Module) -> None:
    """Hand gradients on that were assigned to parameters instead of accumulated by autograd.

    A split backward skips hooks: bf16 gradients would never reach their fp32 masters, and FSDP2
    would add up micro-batches in bf16.
    """
    for parameter in module.parameters():
        hooks: Mapping[int, Any] | None = parameter._post_accumulate_grad_hooks
        if hooks and parameter.grad is not None:
            for hook in hooks.values():
                hook(parameter)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            for group in fully_shard.state(part)._fsdp_param_groups:  # type: ignore[attr-defined]
                for sharded in group.fsdp_params:
                    sharded.accumulate_unsharded_grad_if_needed()
                    sharded.to_accumulated_grad_if_needed()


def _loss_is_output(output: Tensor, target: Tensor) -> Tensor:
    """Take what the last stage returned; the targets already went into it."""
    del target
    return output.sum()
