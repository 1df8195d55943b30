"""The gated activation of SwiGLU (arXiv:2002.05202) in plain PyTorch.

Invariant: only the two inputs are kept for the backward, which takes silu again: a block keeps a
seventh less. A compiler decides that itself and is given the plain formula.

    hidden_TF = swiglu(gate_TF, up_TF)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(``gate``) * ``up``, elementwise."""
    if torch.compiler.is_compiling():
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        d_silu = grad * up
        d_gate = torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_silu)
        return d_gate, F.silu(gate).mul_(grad)
