"""AdamW over bf16: parameters, moments or both kept in bf16, arithmetic in fp32.

torch's fused AdamW writes what it computes by plain rounding; in bf16 a second moment that should
fall by a thousandth of itself, or a weight that should move by less, would then never change. Here
everything written to bf16 is rounded stochastically (train/rounding.py).

Invariant: the update is elementwise and its draws belong to elements of whole parameters, so a step
gives the same bits however parameters are cut. It is gated, and gradients divided, on the device
(train/gate.py); what stays in fp32 follows torch's AdamW.

    optimizer = AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, state_dtype=torch.bfloat16,
                      places={parameter: Place(key, region, shape)})
    optimizer.step()
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.parallel.region import Region
from llmtrain.train.gate import Gate, new_step
from llmtrain.train.rounding import draw, global_indices, rounded

_PIECE = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements worked on at a time, by device: in the cache, or enough to fill the device."""


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
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self._state_of(parameter)
        gate = Gate.of(self, like=parameter)
        if parameter.grad is None:
            return
        gate.divide([parameter.grad])
        number = state["step"] + 1.0
        rule = _Rule(group, number)
        place = self._places[parameter]
        flat = [t.view(-1) for t in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        gradient = parameter.grad.reshape(-1)
        for start, stop in _pieces(parameter):
            pieces = [t[start:stop] for t in flat]
            values = rule.updated([piece.float() for piece in pieces], gradient[start:stop])
            if any(piece.dtype == torch.bfloat16 for piece in pieces):
                index = global_indices(place.region, place.shape, start, stop, parameter.device)
                words = draw(place.key, number, index)
                values = [
                    rounded(value, words, which) if piece.dtype == torch.bfloat16 else value
                    for which, (value, piece) in enumerate(zip(values, pieces, strict=True))
                ]
            gate.write(pieces, values)
        gate.count([state["step"]])

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = new_step(parameter)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self._state_dtype)
        return state


class _Rule:
    """AdamW's formulas (arXiv:1711.05101, algorithm 2) for one update."""

    def __init__(self, group: Mapping[str, Any], number: Tensor) -> None:
        """``number`` is that of the update, counted from 1, on the device."""
        self._beta1, self._beta2 = group["betas"]
        self._eps: float = group["eps"]
        self._kept: float = 1.0 - group["lr"] * group["weight_decay"]
        self._rate = group["lr"] / (1.0 - self._beta1**number)
        self._root = (1.0 - self._beta2**number).sqrt()

    def updated(self, old: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        """Give the new weight and moments for the ``old`` three, fp32; changes nothing."""
        weight, first, second = old
        first = torch.lerp(first, grad, 1.0 - self._beta1)
        second = (second * self._beta2).addcmul_(grad, grad, value=1.0 - self._beta2)
        direction = first / (second.sqrt() / self._root).add_(self._eps)
        return [torch.addcmul(weight * self._kept, direction, -self._rate), first, second]


def _pieces(parameter: Tensor) -> Iterator[tuple[int, int]]:
    """Cut the flattened parameter, so that what is made on the way is bounded."""
    size, total = _PIECE[parameter.device.type], parameter.numel()
    for start in range(0, total, size):
        yield start, min(start + size, total)
