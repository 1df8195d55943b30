"""Lion: the sign of an interpolated momentum (arXiv:2302.06675, algorithm 2).

Invariant: one state per parameter, ``exp_avg``, and an update whose every element has the size of
the learning rate; that wants a rate 3 to 10 times smaller than AdamW's and a decay as much larger
(section 5 there). The update is gated and its gradients divided on the device (optim/gate.py).

    optimizer = Lion([{"params": parameters, "weight_decay": 0.3}], lr=1e-4, betas=(0.95, 0.98))
    optimizer.step()
"""

from typing import Any

import torch
from torch import Tensor

from llmtrain.optim.gate import Gate, state_of
from llmtrain.parallel.replicas import in_buckets


class Lion(torch.optim.Optimizer):
    """The update rule; ``found_inf`` and ``grad_scale`` gate it as in torch's fused optimizers."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Take groups of parameters; a group may have its own ``weight_decay``."""
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the engine has run the backward
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for bucket in in_buckets(parameters):  # temporaries of one bucket at a time
                self._update(bucket, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [state_of(self, p, "exp_avg") for p in parameters]
        moments = [state["exp_avg"] for state in states]
        beta1, beta2 = group["betas"]
        gate = Gate.of(self, like=parameters[0])
        gate.divide(gradients)
        directions = torch._foreach_lerp(moments, gradients, 1.0 - beta1)
        torch._foreach_sign_(directions)
        updated = torch._foreach_mul(parameters, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(updated, directions, alpha=-group["lr"])
        gate.write(parameters, updated)
        gate.write(moments, torch._foreach_lerp(moments, gradients, 1.0 - beta2))
        gate.count([state["step"] for state in states])
