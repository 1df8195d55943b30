"""Rotary positions (arXiv:2104.09864) of queries and keys in one launch.

Invariant: a program reads the angles of its token once and turns all its heads, fp32 inside. The
backward is the same kernel with the sign of the angle changed; nothing but the angles is kept.
Strides are taken as they come, so that the gradients of any attention need no copy. fp64 goes to
plain PyTorch.

Bytes moved for T tokens, N query and G key heads of H elements of b bytes, both ways alike:
2T(N + G)Hb + 4TH; of cos and sin, whose halves repeat, half is read. Two launches would read the
angles twice: 2 % more for 32 and 8 heads of bf16, 15 % more for 4 and 1.

    q_BSNH, k_BSGH = rotate(q_BSNH, k_BSGH, rotation.cos, rotation.sin)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from llmtrain.ops import rope as plain
from llmtrain.ops.triton.grid import next_power_of_2, num_warps

_TILE = 2048
"""Pairs of elements a program turns at a time."""


@triton.jit
def _turn_heads(
    source, target, heads, head_stride, half, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """Turn all heads of one token; ``target`` is contiguous."""
    columns = tl.arange(0, HALF)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        mask = (head < heads)[:, None] & (columns < half)[None, :]
        read = source + head[:, None].to(tl.int64) * head_stride + columns[None, :]
        low = tl.load(read, mask, 0.0).to(tl.float32)
        high = tl.load(read + half, mask, 0.0).to(tl.float32)
        write = target + head[:, None] * (2 * half) + columns[None, :]
        kind = target.dtype.element_ty
        tl.store(write, (low * cos - high * sin).to(kind), mask)
        tl.store(write + half, (high * cos + low * sin).to(kind), mask)


@triton.jit
def _rotate_kernel(
    q, k, cos, sin, q_out, k_out,
    length, q_heads, k_heads, half,
    q_stride_b, q_stride_s, q_stride_n, k_stride_b, k_stride_s, k_stride_n,
    SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row, place = token // length, token % length
    columns = tl.arange(0, HALF)
    angles = token * (2 * half) + half + columns  # the second halves: there the sines are plain
    cosine = tl.load(cos + angles, columns < half, 0.0)[None, :]
    sine = tl.load(sin + angles, columns < half, 0.0)[None, :] * SIGN
    _turn_heads(
        q + row * q_stride_b + place * q_stride_s, q_out + token * q_heads * (2 * half),
        q_heads, q_stride_n, half, cosine, sine, HEADS, HALF,
    )  # fmt: skip
    _turn_heads(
        k + row * k_stride_b + place * k_stride_s, k_out + token * k_heads * (2 * half),
        k_heads, k_stride_n, half, cosine, sine, HEADS, HALF,
    )  # fmt: skip


@triton_op("llmtrain::rotate", mutates_args={})
def _rotate(
    q_BSNH: Tensor, k_BSGH: Tensor, cos: Tensor, sin: Tensor, sign: int
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q_BSNH.new_empty(q_BSNH.shape), k_BSGH.new_empty(k_BSGH.shape)
    rows, length, q_heads, size = q_BSNH.shape
    if rows * length:
        columns = next_power_of_2(size // 2)
        heads = min(next_power_of_2(q_heads), max(1, _TILE // columns))
        wrap_triton(_rotate_kernel)[(rows * length,)](
            q_BSNH, k_BSGH, cos, sin, q_out, k_out,
            length, q_heads, k_BSGH.shape[2], size // 2, *q_BSNH.stride()[:3], *k_BSGH.stride()[:3],
            SIGN=sign, HEADS=heads, HALF=columns, num_warps=num_warps(2 * heads * columns),
        )  # fmt: skip
    return q_out, k_out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Any, ...]:
    cos, sin = ctx.saved_tensors
    d_q, d_k = _rotate(_last_dense(d_q), _last_dense(d_k), cos, sin, -ctx.sign)
    return d_q, d_k, None, None, None


_rotate.register_autograd(_differentiate, setup_context=_keep)


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries [B, S, N, H] and keys [B, S, G, H] by the angles of their positions.

    ``cos`` and ``sin`` are those of a ``Rotation``, [B, S, 1, H].
    """
    if q.dtype == torch.float64 or cos.dtype == torch.float64:
        return plain.rotate(q, k, cos, sin)
    turned: tuple[Tensor, Tensor] = _rotate(
        _last_dense(q), _last_dense(k), cos.contiguous(), sin.contiguous(), 1
    )
    return turned
