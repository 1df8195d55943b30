"""Muon: momentum made orthogonal, for the matrices of the blocks; AdamW for everything else.

The momentum of a matrix is replaced by the nearest matrix with equal singular values, which
Newton-Schulz iterations approximate, and scaled to the size of AdamW's updates, so that AdamW's
learning rate and decay carry over (arXiv:2502.16982, section 2.2 and equation 4).

Invariant: the iterations see whole matrices, wherever the parts of them lie (parallel/matrices.py);
the rest is elementwise, so a step does the same on every layout, but for the rounding of products
whose matrices are taken together in another number. The update is gated and its gradients divided
on the device (optim/gate.py).

    optimizer = Muon(matrices, rest=adamw, matrix_map=matrix_map(owned, world), config=config)
    optimizer.step()
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.engine.protocol import LR_MULTIPLIER
from llmtrain.model.parameters import ParameterInfo
from llmtrain.optim.gate import Gate, state_of
from llmtrain.parallel.matrices import MatrixMap

MOMENTUM = 0.95
"""Decay of the momentum where ``optimizer.momentum`` names none; Keller Jordan's choice."""

NEWTON_SCHULZ_STEPS = 5
"""Iterations where ``optimizer.newton_schulz_steps`` names none; arXiv:2502.16982, section 2.1."""

NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in the polynomial that moves singular values towards 1.

From Keller Jordan's kellerjordan.github.io/posts/muon (2024), kept by arXiv:2502.16982, equation 2:
their slope at 0 is steep and values end between 0.7 and 1.2, not at 1, which does no harm.
"""

UPDATE_RMS = 0.2
"""Root mean square of an update at rate 1, as AdamW's has; arXiv:2502.16982, equation 4."""

SMALLEST_NORM = 1e-7
"""Norm below which a matrix counts as zero."""

BATCH_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 25}
"""Elements of the matrices of one batch, by device; at least one matrix.

Larger ones fill a device alone; on the CPU, beyond its caches, batches cost more than they save.
"""


def orthogonalize(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Bring all singular values of every matrix near 1 by Newton-Schulz iterations.

    Works in the type of ``matrices``; values below about 0.002 of a matrix's norm stay small after
    5 steps.

    Args:
        matrices: one [rows, columns], or a batch [B, rows, columns].
        steps: number of iterations.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    norms = torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=SMALLEST_NORM)
    x: Tensor = wide / norms
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_all(matrices: Sequence[Tensor], steps: int = NEWTON_SCHULZ_STEPS) -> list[Tensor]:
    """Orthogonalise matrices, those of equal size (tall ones turned) in batches."""
    alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        alike[tuple(sorted(matrix.shape))].append(number)
    results = list(matrices)
    for (small, large), numbers in alike.items():
        limit = BATCH_ELEMENTS[matrices[numbers[0]].device.type]
        size = max(1, limit // (small * large))
        for start in range(0, len(numbers), size):
            members = numbers[start : start + size]
            if len(members) == 1:  # a batch of one is slower than a matrix
                results[members[0]] = orthogonalize(matrices[members[0]], steps)
                continue
            wide = torch.stack([_wide(matrices[number]) for number in members])
            for number, result in zip(members, orthogonalize(wide, steps), strict=True):
                results[number] = result if _is_wide(matrices[number]) else result.T
    return results


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T


class Muon(torch.optim.Optimizer):
    """Muon and another rule as one optimizer; the first group holds the matrices, if there are any.

    ``found_inf`` and ``grad_scale`` gate it as in torch's fused optimizers. ``step`` is collective
    where ``matrix_map`` is.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        matrices: Sequence[tuple[ParameterInfo, nn.Parameter]],
        rest: torch.optim.Optimizer | None,
        matrix_map: MatrixMap,
        config: OptimizerConfig,
    ) -> None:
        """Take (the local parts of) matrices with their rows of the table.

        Args:
            matrices: what Muon updates.
            rest: the gated optimizer of everything else, None where there is nothing else; its
                groups and its state become part of this one.
            matrix_map: applies Newton-Schulz to whole matrices.
            config: rate, decay, momentum, iterations.
        """
        # muP: the spectral norm of an orthogonal matrix times UPDATE_RMS sqrt(size) grows with the
        # root of the width, AdamW's with the width
        width = math.sqrt(matrices[0][0].width_multiplier) if matrices else 1.0
        own = {
            "params": [p for _, p in matrices],
            "weight_decay": config.weight_decay * width,
            LR_MULTIPLIER: 1.0 / width,
        }
        others = [] if rest is None else rest.param_groups
        # a pipeline stage without blocks has no matrix
        super().__init__([own, *others] if matrices else others, {"lr": config.lr})
        self._rest = rest
        if rest is not None:
            rest.state = self.state
        self._names = [info.name for info, _ in matrices]
        self._scales = [UPDATE_RMS * math.sqrt(max(info.shape)) for info, _ in matrices]
        self._matrix_map = matrix_map
        self._momentum = MOMENTUM if config.momentum is None else config.momentum
        self._num_steps = config.newton_schulz_steps or NEWTON_SCHULZ_STEPS
        self._bf16 = config.muon_dtype == "bf16"

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the engine has run the backward
        """Update every parameter that has a gradient."""
        if self._names:
            self._update_matrices(self.param_groups[0])
        if self._rest is not None:
            for name in ("found_inf", "grad_scale"):
                setattr(self._rest, name, getattr(self, name, None))
            self._rest.step()

    def _update_matrices(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = group["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        states = [state_of(self, p, "momentum") for p in parameters]
        momenta = [state["momentum"] for state in states]
        gate = Gate.of(self, like=parameters[0])
        gate.divide(gradients)
        moved = torch._foreach_mul(momenta, self._momentum)
        torch._foreach_add_(moved, gradients)
        ahead = torch._foreach_add(gradients, moved, alpha=self._momentum)  # Nesterov
        directions = self._orthogonalize(ahead)
        torch._foreach_mul_(directions, [-group["lr"] * scale for scale in self._scales])
        torch._foreach_add_(
            directions,
            torch._foreach_mul(parameters, 1.0 - group["lr"] * group["weight_decay"]),
        )
        gate.write(momenta, moved)
        gate.write(parameters, directions)
        gate.count([state["step"] for state in states])

    def _orthogonalize(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Give the local parts of the orthogonalised wholes of which ``parts`` are local parts."""
        dtype = torch.bfloat16 if self._bf16 else parts[0].dtype
        values = {name: part.to(dtype) for name, part in zip(self._names, parts, strict=True)}
        results = self._matrix_map(
            lambda wholes: orthogonalize_all(wholes, self._num_steps), values
        )
        return [results[name].to(parts[0].dtype) for name in self._names]
