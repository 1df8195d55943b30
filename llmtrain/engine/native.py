"""The engine on PyTorch's own parallelism: FSDP2, torch.distributed.pipelining, and parallel/.

Invariant: every rank returns the same bits, no call makes the host wait for the device, and a step
whose loss or gradient norm is not finite or beyond its limits changes nothing.

    local = build_local_model(config.model, config.parallel, config.engine, world, seed, loss)
    engine = NativeEngine(local, optimizer_factory(config.optimizer), grad_clip_norm=1.0)
    result = engine.train_step(batch, lr=3e-4, limits=no_limits(world.device))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.engine.in_backward import InBackward
from llmtrain.engine.protocol import OptimizerFactory, StepLimits, StepResult
from llmtrain.engine.state import (
    gated_step,
    load_state_dict,
    make_optimizer_state,
    state_dict,
)
from llmtrain.engine.step import (
    RankSums,
    clip_divisor,
    count_targets,
    set_learning_rate,
    step_result,
    within,
)
from llmtrain.errors import ConfigError
from llmtrain.hang.heartbeat import Phase
from llmtrain.parallel.local import LocalModel, OwnedParameter
from llmtrain.parallel.matrices import matrix_map
from llmtrain.parallel.scopes import OPTIMIZER, scope
from llmtrain.parallel.stage import StageModule


@dataclass(frozen=True, slots=True)
class _Counted:
    """Which of a list of parameters this rank counts, and where their norms go."""

    places: list[int]
    """Places in the list."""
    rows: Tensor
    """Rows of the table, int64 on the device."""

    @classmethod
    def of(cls, owned: Sequence[OwnedParameter], device: torch.device) -> Self:
        """Find those of which this rank is the first holder."""
        places = [place for place, one in enumerate(owned) if one.counted]
        rows = [owned[place].index for place in places]
        return cls(places, torch.tensor(rows, dtype=torch.int64, device=device))


class NativeEngine:
    """Steps of one model on this rank's part of the mesh; see ``engine.protocol.Engine``."""

    def __init__(
        self,
        local: LocalModel,
        optimizer_factory: OptimizerFactory,
        grad_clip_norm: float,
        update_in_backward: bool = False,
    ) -> None:
        """Make the optimizer of what ``local`` owns, its state included."""
        self._local = local
        self._world = local.world
        self._grad_clip_norm = grad_clip_norm
        self._dtype = torch.promote_types(local.parameters[0].local.dtype, torch.float32)
        matrices = matrix_map(local.parameters, local.world)
        self._in_backward: InBackward | None = None
        self._optimizer: torch.optim.Optimizer
        if update_in_backward:
            self._in_backward = InBackward(local, optimizer_factory, matrices)
            self._optimizer = self._in_backward.optimizer
        else:
            named = [(o.info, o.local) for o in local.parameters]
            regions = [o.region for o in local.parameters]
            self._optimizer = optimizer_factory(named, matrices, regions)
            make_optimizer_state(local, self._optimizer)
        self._trained = _Counted.of(local.parameters, self._world.device)
        self._plain = [owned for owned in local.owned if owned.packed is None]
        self._all = _Counted.of(self._plain, self._world.device)
        self._rank_sums = RankSums(local.world, local.loss_rank)
        self._divisor = torch.ones((), device=self._world.device)
        self._before_update: Callable[[], None] = lambda: None

    def train_step(self, batch: StepBatch, lr: float, limits: StepLimits) -> StepResult:
        """Forward, backward, clip and, within the limits, update with learning rate ``lr``."""
        weight = count_targets(batch, self._world)
        self._local.clear_gradients()
        if self._in_backward is not None:
            return self._train_in_backward(self._in_backward, batch, lr, weight)
        mine = self._local.run(batch, scale=1.0 / weight, training=True)
        self._world.beat.at(Phase.OPTIMIZER)
        gradients = self._local.reduce_gradients()
        squares, sums = self._rank_sums.add(self._squares(gradients, self._trained), mine)
        grad_norm = squares.sum().sqrt()
        applied = within(sums["loss_sum"] / weight, grad_norm, limits)
        self._update(gradients, lr, grad_norm, applied)
        self._world.beat.at(Phase.OBSERVE)
        return step_result(sums, weight, grad_norm, applied, self._dtype, squares)

    def _train_in_backward(
        self, updates: InBackward, batch: StepBatch, lr: float, weight: Tensor
    ) -> StepResult:
        """Forward and a backward that updates; limits come too late, each gradient is gated."""
        self._before_update()
        updates.begin(lr)
        mine = self._local.run(batch, scale=1.0 / weight, training=True)
        self._local.publish_parameters()
        squares, sums = self._rank_sums.add(updates.squares, mine)
        updates.count(squares)
        grad_norm = squares.sum().sqrt()
        applied = torch.isfinite(grad_norm)
        self._world.beat.at(Phase.OBSERVE)
        return step_result(sums, weight, grad_norm, applied, self._dtype, squares)

    def eval_step(self, batch: StepBatch) -> StepResult:
        """Forward only, over the same kind of batch."""
        self._world.beat.at(Phase.EVALUATE)
        weight = count_targets(batch, self._world)
        mine = self._local.run(batch, scale=None, training=False)
        _, sums = self._rank_sums.add(self._squares([], self._trained), mine)
        self._world.beat.at(Phase.OBSERVE)
        zero = torch.zeros((), dtype=torch.float64, device=self._world.device)
        return step_result(sums, weight, zero, zero.bool(), self._dtype)

    def _update(
        self, gradients: list[Tensor], lr: float, grad_norm: Tensor, applied: Tensor
    ) -> None:
        """Clip by dividing inside the optimizer; skip on the device where not ``applied``."""
        for owned, gradient in zip(self._local.parameters, gradients, strict=True):
            owned.local.grad = gradient
        set_learning_rate(self._optimizer, lr)
        divisor = clip_divisor(grad_norm, self._grad_clip_norm)
        self._before_update()
        with scope(OPTIMIZER):
            gated_step(self._optimizer, skip=(~applied).float(), divisor=divisor)
            self._local.publish_parameters()
        self._divisor = torch.where(applied, divisor, 1.0)  # a refused step divides nothing

    def weight_squares(self) -> Tensor:
        """Squared norms of this rank's part of the parameters by row of the table, float64."""
        squares = self._squares([owned.local.detach() for owned in self._plain], self._all)
        for owned in self._local.owned:
            if owned.packed is not None and owned.counted:
                squares[owned.index] = owned.values().norm().to(squares).square()
        return squares

    def stages(self) -> tuple[StageModule, ...]:
        """Stages of this rank, in the order of the model."""
        return self._local.modules

    def _squares(self, values: list[Tensor], counted: "_Counted") -> Tensor:
        """Squared norms by row of the table, float64; of equal regions the first holder's alone.

        In the order of the table, so that layouts agree on the norm.
        """
        squares = torch.zeros(
            len(self._local.table), dtype=torch.float64, device=self._world.device
        )
        if values and counted.places:
            first = [values[i] for i in counted.places]
            norms = torch.stack(torch._foreach_norm(first, dtype=self._dtype))
            squares[counted.rows] = norms.to(squares).square()
        return squares

    def gradients(self) -> dict[str, Tensor]:
        """Full gradients (before clipping) of the last train_step by global name; collective.

        Raises:
            ConfigError: they were freed in the backward.
        """
        if self._in_backward is not None:
            raise ConfigError(
                "optimizer.in_backward=true frees every gradient once it is used, and gradients "
                "of a step were asked for; use optimizer.in_backward=false"
            )
        trained = self._local.parameters
        whole = self._gather(trained, [owned.local_gradient() for owned in trained])
        divisor = self._divisor.cpu()
        return {name: gradient * divisor.to(gradient.dtype) for name, gradient in whole.items()}

    def full_parameters(self) -> dict[str, Tensor]:
        """Full logical parameters by global name, on CPU, on every rank; collective."""
        owned = self._local.owned
        return self._gather(owned, [one.values() for one in owned])

    def _gather(self, holders: Sequence[OwnedParameter], values: list[Tensor]) -> dict[str, Tensor]:
        """Put the regions of all ranks together, on the CPU of every rank.

        Of parameters that are not trained only where ``holders`` has them.
        """
        frozen = any(not owned.info.trainable for owned in holders)
        mine = {
            owned.index: (owned.region, value)
            for owned, value in zip(holders, values, strict=True)
            if owned.counted
        }
        whole: dict[str, Tensor] = {}
        for index, info in enumerate(self._local.table):
            if not (info.trainable or frozen):
                continue
            tensor = torch.zeros(info.shape, dtype=self._dtype, device=self._world.device)
            if index in mine:
                region, value = mine[index]
                tensor[region] = value.to(tensor)
            whole[info.name] = self._world.sum(tensor).cpu()
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Name what this rank owns in the schema of ``engine.state``; shares storage."""
        return state_dict(self._local, self._optimizer)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state of the schema, whole or sharded as here.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        load_state_dict(self._local, self._optimizer, state)

    def before_update(self, act: Callable[[], None]) -> None:
        """Have ``act`` called in every step before it changes parameters or optimizer state."""
        self._before_update = act

    def close(self) -> None:
        """Free gradients and optimizer state; no collective."""
        self._local.clear_gradients()
        self._optimizer.state.clear()
