"""What every engine does alike around its forward and backward: weigh, gate, report.

Invariant: nothing here makes the host wait; every rank computes the same bits.

    applied = within(loss_sum / weight, grad_norm, limits)
    divisor = clip_divisor(grad_norm, clip_norm=1.0)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmtrain.engine.protocol import StepLimits, StepResult


def within(loss: Tensor, grad_norm: Tensor, limits: StepLimits) -> Tensor:
    """Tell on the device whether a step may be applied; finiteness is checked first."""
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    return finite & (loss <= limits.max_loss) & (grad_norm <= limits.max_grad_norm)


def clip_divisor(grad_norm: Tensor, clip_norm: float) -> Tensor:
    """What gradients are divided by so that their norm is at most ``clip_norm``; float32."""
    return (grad_norm / clip_norm).clamp(min=1.0).float()


def step_result(
    sums: Mapping[str, Tensor],
    weight: Tensor,
    grad_norm: Tensor,
    applied: Tensor,
    dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Report a step from its global sums, ``loss_sum`` among them, in the engine's dtype."""
    return StepResult(
        loss_sum=sums["loss_sum"].to(dtype),
        target_tokens=weight.to(dtype),
        grad_norm=grad_norm.to(dtype),
        applied=applied,
        metrics={name: value.to(dtype) for name, value in sums.items() if name != "loss_sum"},
    )
