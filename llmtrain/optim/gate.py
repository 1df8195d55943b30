"""Skip or divide an update by scalars on the device, as torch's fused optimizers do.

An engine sets two attributes of an optimizer before ``step()``: ``found_inf`` (1 skips the update)
and ``grad_scale`` (divides the gradients); see docs/decisions/gated-update.md.

Invariant: a skipped update changes no bit of anything, whatever the gradients hold, and nothing
asks the device for a value.

    gate = Gate.of(optimizer, like=parameters[0])
    gate.divide(gradients)
    gate.write(parameters, updated)     # where the step is not skipped
    gate.count(steps)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gate:
    """What one step may do."""

    open: Tensor
    """Whether the update is applied, bool scalar."""
    divisor: Tensor | None
    """What gradients are divided by, scalar; 1 where the update is skipped."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, like: Tensor) -> "Gate":
        """Read the gate that the engine set; open where it set none."""
        found = getattr(optimizer, "found_inf", None)
        scale = getattr(optimizer, "grad_scale", None)
        refused = torch.zeros((), device=like.device) if found is None else found.to(like.device)
        applied = refused == 0
        if scale is None:
            return cls(applied, None)
        return cls(applied, torch.where(applied, scale.to(like), 1.0))

    def divide(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients in place, as the fused optimizers do."""
        if self.divisor is not None:
            torch._foreach_div_(list(gradients), self.divisor)

    def write(self, targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Put ``values`` into ``targets`` where the update is applied."""
        for target, value in zip(targets, values, strict=True):
            torch.where(self.open, value, target, out=target)

    def count(self, steps: Sequence[Tensor]) -> None:
        """Add one to the update counts where the update is applied."""
        # without alpha torch takes a scalar tensor for a number, and waits for it
        torch._foreach_add_(list(steps), self.open.to(steps[0].dtype), alpha=1)


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor, moment: str) -> dict[str, Tensor]:
    """Give the state of a parameter, made at first use: ``step`` and one tensor of its size."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = new_step(parameter)
        state[moment] = torch.zeros_like(parameter)
    return state


def new_step(parameter: Tensor) -> Tensor:
    """Start a count of updates as torch's fused optimizers keep it: float32, on the device."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device)
