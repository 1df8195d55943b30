"""SwiGLU's gated activation (arXiv:2002.05202): one pass forward, one backward.

Invariant: arithmetic is fp32 with one rounding of each result. Nothing but the inputs is kept: the
backward takes silu again while it holds them. fp64 goes to plain PyTorch.

Bytes moved for T x F elements of b bytes: 3TFb forward, 5TFb backward.

    hidden_TF = swiglu(gate_TF, up_TF)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from llmtrain.ops import swiglu as plain

_BLOCK = 2048
"""Elements of a program: 16 for each thread of 4 warps."""


@triton.jit
def _forward_kernel(gate, up, out, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    value = tl.load(gate + places, mask, 0.0).to(tl.float32)
    factor = tl.load(up + places, mask, 0.0).to(tl.float32)
    result = value * tl.sigmoid(value) * factor
    tl.store(out + places, result.to(out.dtype.element_ty), mask)


@triton.jit
def _backward_kernel(grad, gate, up, d_gate, d_up, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    value = tl.load(gate + places, mask, 0.0).to(tl.float32)
    factor = tl.load(up + places, mask, 0.0).to(tl.float32)
    passed = tl.load(grad + places, mask, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(value)
    silu = value * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    tl.store(d_gate + places, (passed * factor * slope).to(d_gate.dtype.element_ty), mask)
    tl.store(d_up + places, (passed * silu).to(d_up.dtype.element_ty), mask)


@triton_op("llmtrain::swiglu", mutates_args={})
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    size = gate.numel()
    if size:
        wrap_triton(_forward_kernel)[(triton.cdiv(size, _BLOCK),)](gate, up, out, size, _BLOCK)
    return out


@triton_op("llmtrain::swiglu_backward", mutates_args={})
def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    size = gate.numel()
    if size:
        wrap_triton(_backward_kernel)[(triton.cdiv(size, _BLOCK),)](
            grad, gate, up, d_gate, d_up, size, _BLOCK
        )
    return d_gate, d_up


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor] = _swiglu_backward(grad.contiguous(), *ctx.saved_tensors)
    return grads


_swiglu.register_autograd(_differentiate, setup_context=_keep)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(``gate``) * ``up``, elementwise on tensors of one shape."""
    if gate.dtype == torch.float64:
        return plain.swiglu(gate, up)
    out: Tensor = _swiglu(gate.contiguous(), up.contiguous())
    return out
