"""What every engine does alike around its forward and backward: weigh, gate, report.

Invariant: nothing here makes the host wait; every rank computes the same bits.

    weight = count_targets(batch, world)
    squares, sums = rank_sums.add(squares, sums)
    applied = within(sums["loss_sum"] / weight, grad_norm, limits)
    divisor = clip_divisor(grad_norm, clip_norm=1.0)
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from llmtrain.data.batch import StepBatch
from llmtrain.engine.protocol import LR_MULTIPLIER, StepLimits, StepResult
from llmtrain.parallel.mesh import World


def no_limits(device: torch.device) -> StepLimits:
    """Apply every step that is finite."""
    infinite = torch.tensor(math.inf, device=device)
    return StepLimits(max_loss=infinite, max_grad_norm=infinite)


def count_targets(batch: StepBatch, world: World) -> Tensor:
    """Sum the weights of the targets in the global batch, float64."""
    return world.sum(batch.loss_weight.sum(dtype=torch.float64), "dp")


class RankSums:
    """Adds squared gradient norms and the sums of the loss over all ranks, in one collective."""

    def __init__(self, world: World, loss_rank: int) -> None:
        """``loss_rank`` is a rank that has the loss; not all have."""
        self._world = world
        self._loss_rank = loss_rank
        self._shapes: list[tuple[str, tuple[int, ...]]] | None = None

    def add(self, squares: Tensor, sums: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum ``squares``, float64 [rows of the table], and ``sums``; the latter empty on some.

        Ranks agree on every bit.
        """
        if self._shapes is None:  # learnt once: which sums the loss gives
            mine = [(name, tuple(value.shape)) for name, value in sums.items()]
            self._shapes = self._world.share(mine, source=self._loss_rank)
        flat = [
            sums[name].reshape(-1) if name in sums else squares.new_zeros(math.prod(shape))
            for name, shape in self._shapes
        ]
        packed = self._world.sum(torch.cat([squares, *flat]))
        parts = torch.split(packed, [len(squares), *(part.numel() for part in flat)])
        named = zip(self._shapes, parts[1:], strict=True)
        return parts[0], {name: part.view(shape) for (name, shape), part in named}


def within(loss: Tensor, grad_norm: Tensor, limits: StepLimits) -> Tensor:
    """Tell on the device whether a step may be applied; finiteness is checked first."""
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    return finite & (loss <= limits.max_loss) & (grad_norm <= limits.max_grad_norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_MULTIPLIER]


def clip_divisor(grad_norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients are divided by so that their norm is at most ``clip_norm``; float32."""
    return (grad_norm / clip_norm).clamp(min=1.0).float()


def step_result(
    sums: Mapping[str, Tensor],
    weight: Tensor,
    grad_norm: Tensor,
    applied: Tensor,
    dtype: torch.dtype = torch.float32,
    squares: Tensor | None = None,
) -> StepResult:
    """Report a step from its global sums, ``loss_sum`` among them, in the engine's dtype.

    ``squares`` are those of the gradients, by row of the table.
    """
    return StepResult(
        loss_sum=sums["loss_sum"].to(dtype),
        target_tokens=weight.to(dtype),
        grad_norm=grad_norm.to(dtype),
        applied=applied,
        metrics={name: value.to(dtype) for name, value in sums.items() if name != "loss_sum"},
        gradient_squares=squares,
    )
