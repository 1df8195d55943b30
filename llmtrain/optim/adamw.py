"""AdamW over bf16: parameters, moments or both kept in bf16, arithmetic in fp32.

torch's fused AdamW writes what it computes by plain rounding; in bf16 a second moment that should
fall by a thousandth of itself, or a weight that should move by less, would then never change. Here
the same kernel works on fp32 copies, a piece at a time, and everything written to bf16 is rounded
stochastically (optim/rounding.py).

Invariant: the update is elementwise and its draws belong to elements of whole parameters, so a step
gives the same bits however parameters are cut. It is gated, and gradients divided, on the device
(optim/gate.py).

    optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.bfloat16,
                      places={parameter: Place(key, region, shape)})
    optimizer.step()
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.optim.gate import Gate, new_step
from llmtrain.optim.rounding import draw, global_indices, rounded
from llmtrain.parallel.region import Region

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements worked on at a time, by device: in the cache, or enough to fill the device."""

_VECTORS = 64
"""A multiple of the elements that any kernel works on at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the elements of a local tensor draw their roundings."""

    key: int
    """Of the parameter's stream."""
    region: Region
    """What the tensor is of the whole parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""


class AdamW(torch.optim.Optimizer):
    """The update rule; ``found_inf`` and ``grad_scale`` gate it as in torch's fused optimizers."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        state_dtype: torch.dtype,
        places: Mapping[Tensor, Place],
    ) -> None:
        """Take groups of parameters, fp32 or bf16, each with its ``weight_decay``.

        Args:
            params: groups; gradients are fp32.
            lr: learning rate of all groups.
            betas: decays of the two moments.
            eps: added to the root of the second moment.
            state_dtype: type of the moments, fp32 or bf16.
            places: of every parameter.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._state_dtype = state_dtype
        self._places = places

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the engine has run the backward
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(parameter)
        gate = Gate.of(self, like=parameter)
        gate.divide([gradient])
        place, number = self._places[parameter], state["step"] + 1.0
        kept = parameter, state["exp_avg"], state["exp_avg_sq"]
        flat = [t.view(-1) for t in (*kept, gradient.contiguous())]
        size = min(_PIECE[parameter.device.type], parameter.numel())
        work = torch.zeros(len(flat), _padded(size), device=parameter.device)
        for start in range(0, parameter.numel(), size or 1):
            stop = min(start + size, parameter.numel())
            pieces = [t[start:stop] for t in flat]
            values = work[:, : stop - start].unbind()
            torch._foreach_copy_(values, pieces)
            _fused(work[:, : _padded(stop - start)].unbind(), group, number, gate)
            index = global_indices(place.region, place.shape, start, stop, parameter.device)
            words = draw(place.key, number, index)
            # of a skipped update these are the values that bf16 holds: no rounding moves them
            for which, piece in enumerate(pieces[:-1]):
                in_bf16 = piece.dtype == torch.bfloat16
                piece.copy_(rounded(values[which], words, which) if in_bf16 else values[which])
        gate.count([state["step"]])

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = new_step(parameter)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self._state_dtype)
        return state


def _fused(work: Sequence[Tensor], group: dict[str, Any], number: Tensor, gate: Gate) -> None:
    """Update weight and moments, the first three of ``work``, by torch's fused kernel."""
    weight, first, second, gradient = work
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [weight], [gradient], [first], [second], [], [number],
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=False, found_inf=(~gate.open).float(),
    )  # fmt: skip


def _padded(size: int) -> int:
    """Give the elements a kernel works on: all in its vectors, whose last bits a rest has not."""
    return -(-size // _VECTORS) * _VECTORS
