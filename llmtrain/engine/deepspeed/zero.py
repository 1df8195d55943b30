"""The engine on DeepSpeed's ZeRO 0 to 3, for one pipeline stage; see engine.protocol.Engine.

DeepSpeed gathers, reduces and stores; what a step computes is ours: the loss and its weights, the
norm, clipping, the gate, the optimizer, start values and the state.

Invariant: the numbers are those of the native engine. The host waits for the device only where
DeepSpeed insists on a norm of its own: ZeRO 3, offload, and ZeRO 1 in bf16.

    engine = make_zero_engine(parts, world)
    result = engine.train_step(batch, lr=3e-4, limits=no_limits(world.device))
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.engine.deepspeed.build import ZeroModel, build_zero_model
from llmtrain.engine.deepspeed.runtime import detach
from llmtrain.engine.deepspeed.state import load_state_dict, make_optimizer_state, state_dict
from llmtrain.engine.protocol import EngineParts, StepLimits, StepResult
from llmtrain.engine.step import (
    RankSums,
    clip_divisor,
    count_targets,
    set_learning_rate,
    step_result,
    within,
)
from llmtrain.hang.heartbeat import Phase
from llmtrain.parallel.mesh import World
from llmtrain.parallel.stage import StageModule, batch_fields


def make_zero_engine(parts: EngineParts, world: World) -> "ZeroEngine":
    """Make the engine of this rank; collective.

    Raises:
        ConfigError: DeepSpeed is not installed.
        LayoutError: the optimizer needs whole matrices, which ZeRO does not keep.
    """
    return ZeroEngine(build_zero_model(parts, world), world, parts.grad_clip_norm)


class ZeroEngine:
    """Steps of one model under ZeRO."""

    def __init__(self, built: ZeroModel, world: World, grad_clip_norm: float) -> None:
        """Take over what ``build_zero_model`` made, and make the optimizer's state."""
        self._built = built
        self._deepspeed = built.deepspeed
        self._module = built.module
        self._holder = built.holder
        self._optimizer = built.optimizer
        self._world = world
        self._grad_clip_norm = grad_clip_norm
        self._divisor = torch.ones((), device=world.device)
        self._gradients: dict[Tensor, Tensor] = {}
        self._rank_sums = RankSums(world, world.world_size - 1)  # of the last stage
        make_optimizer_state(self._holder, self._optimizer)
        self._optimizer.register_step_pre_hook(self._keep_gradients)
        runs = [run for partition in self._holder.partitions for run in partition.runs]
        rows = [run.index for run in runs]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=world.device)

    def train_step(self, batch: StepBatch, lr: float, limits: StepLimits) -> StepResult:
        """Forward, backward, clip and, within the limits, update with learning rate ``lr``."""
        weight = count_targets(batch, self._world)
        self._holder.clear()
        self._gradients.clear()
        # DeepSpeed averages over the data ranks; gradients here are sums.
        self._run(batch, scale=self._world.dp_size / weight, training=True)
        self._world.beat.at(Phase.OPTIMIZER)
        gradients = self._holder.gradients()
        squares, sums = self._rank_sums.add(self._squares(gradients), self._module.totals)
        grad_norm = squares.sum().sqrt()
        applied = within(sums["loss_sum"] / weight, grad_norm, limits)
        partitions = self._holder.partitions
        self._gradients = {p.tensor: g for p, g in zip(partitions, gradients, strict=True)}
        applied = self._update(lr, grad_norm, applied)
        self._world.beat.at(Phase.OBSERVE)
        return step_result(sums, weight, grad_norm, applied, squares=squares)

    def eval_step(self, batch: StepBatch) -> StepResult:
        """Forward only, over the same kind of batch."""
        self._world.beat.at(Phase.EVALUATE)
        weight = count_targets(batch, self._world)
        self._run(batch, scale=None, training=False)
        _, sums = self._rank_sums.add(self._squares([]), self._module.totals)
        self._world.beat.at(Phase.OBSERVE)
        zero = torch.zeros((), dtype=torch.float64, device=self._world.device)
        return step_result(sums, weight, zero, zero.bool())

    def _run(self, batch: StepBatch, scale: Tensor | None, training: bool) -> None:
        """Run all micro-batches; in training the last one's backward finishes the sums."""
        self._module.scale, self._module.totals = scale, {}
        parts, beat = batch.microbatches(), self._world.beat
        for number, part in enumerate(parts, start=1):
            beat.at(Phase.FORWARD if training else Phase.EVALUATE, number)
            if training:
                self._deepspeed.set_gradient_accumulation_boundary(number == len(parts))
            with torch.set_grad_enabled(training):
                loss = self._deepspeed(part.tokens, **batch_fields(part))
            if training:
                beat.at(Phase.BACKWARD, number)
                self._deepspeed.backward(loss.sum(), scale_wrt_gas=False)

    def _update(self, lr: float, grad_norm: Tensor, applied: Tensor) -> Tensor:
        """Clip by dividing inside the optimizer; skip on the device where not ``applied``.

        Returns:
            Whether the update was made: a norm of DeepSpeed's own may overflow before ours does.
        """
        set_learning_rate(self._optimizer, lr)
        divisor = clip_divisor(grad_norm, self._grad_clip_norm)
        device = self._holder.partitions[0].tensor.device  # the host's under offload
        self._optimizer.found_inf = (~applied).float().to(device)  # type: ignore[attr-defined]
        self._optimizer.grad_scale = divisor.to(device)  # type: ignore[attr-defined]
        self._deepspeed.step()
        overflow = getattr(self._deepspeed.optimizer, "overflow", False)
        if overflow:
            applied = torch.zeros_like(applied)
        # ZeRO publishes what it cut, but ZeRO 3 leaves a step that overflowed half-way: with the
        # parameters cut that its next forward takes for whole.
        if self._holder.replicated or overflow:
            self._holder.publish()
        self._divisor = torch.where(applied, divisor, 1.0)  # a refused step divides nothing
        return applied

    def _keep_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Keep the very tensors the optimizer is given: DeepSpeed drops its references."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._gradients[parameter] = parameter.grad

    def weight_squares(self) -> Tensor:
        """Squared norms of this rank's part of the parameters by row of the table, float64."""
        return self._squares([p.tensor.detach() for p in self._holder.partitions])

    def stages(self) -> tuple[StageModule, ...]:
        """Give the stage of this rank."""
        return (self._module,)

    def _squares(self, values: list[Tensor]) -> Tensor:
        """Squared norms of what this rank holds by row of the table, float64."""
        device = self._world.device
        squares = torch.zeros(len(self._built.table), dtype=torch.float64, device=device)
        counted = not self._holder.replicated or self._world.dp_rank == 0
        if values and counted and len(self._rows):
            pieces = [
                run.of(value)
                for partition, value in zip(self._holder.partitions, values, strict=True)
                for run in partition.runs
            ]
            norms = torch.stack(torch._foreach_norm(pieces)).to(squares)
            squares.index_add_(0, self._rows, norms.square())
        return squares

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients (before clipping) of the last train_step by global name; collective."""
        divisor = self._divisor.cpu()
        return {name: value * divisor for name, value in self._whole(self._gradients).items()}

    def full_parameters(self) -> dict[str, Tensor]:
        """Full logical parameters by global name, on CPU, on every rank; collective."""
        return self._whole({p.tensor: p.tensor.detach() for p in self._holder.partitions})

    def _whole(self, values: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        """Put the runs of all ranks together; bits are added, so that -0.0 stays -0.0."""
        counted = not self._holder.replicated or self._world.dp_rank == 0
        runs: dict[int, list[tuple[Any, Tensor]]] = {}
        for partition in self._holder.partitions if counted else ():
            for run in partition.runs:
                runs.setdefault(run.index, []).append((run, run.of(values[partition.tensor])))
        whole = {}
        for index, info in enumerate(self._built.table):
            tensor = torch.zeros(info.numel, device=self._world.device)
            for run, value in runs.get(index, []):
                tensor[run.start : run.start + run.length] = value
            self._world.sum(tensor.view(torch.int32))
            whole[info.name] = tensor.view(info.shape).cpu()
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Name what this rank owns in the schema of ``engine.state``; shares storage."""
        return state_dict(self._holder, self._optimizer)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state of the schema, whole or in portions as here; collective.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        load_state_dict(self._holder, self._optimizer, state)

    def before_update(self, act: Callable[[], None]) -> None:
        """Have ``act`` called in every step before it changes parameters or optimizer state."""

        def hook(*_: Any) -> None:
            act()

        self._optimizer.register_step_pre_hook(hook)

    def close(self) -> None:
        """Free gradients and optimizer state and take DeepSpeed's hooks off; no collective."""
        self._gradients.clear()
        self._optimizer.state.clear()
        detach(self._deepspeed)
