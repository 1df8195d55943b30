"""RMSNorm (arXiv:1910.07467), alone or with the residual sum before it, in one pass each way.

Invariant: a row is read once and held in registers; sums are fp32. The weight's gradient is summed
by each program over its rows in a fixed order, then over the programs in one reduction: no atomics,
so the same device gives the same bits. fp64 goes to plain PyTorch.

Bytes moved for T rows of D elements of b bytes: ``rms_norm`` 2TDb forward and 3TDb backward,
``add_rms_norm`` 4TDb forward and 4TDb backward; weights and statistics are left out.

    normed_TD = rms_norm(x_TD, weight_D, 1e-5)
    normed_TD, sum_TD = add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from llmtrain.ops import norm as plain
from llmtrain.ops.triton.grid import as_rows, next_power_of_2, num_warps, programs_per_device

_TILE = 4096
"""Elements of a tile: rows shorter than this share one."""


@triton.jit
def _forward_kernel(
    x, residual, weight, normed, total, rstd,
    num_rows, size, x_stride, residual_stride,
    EPS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    places = rows[:, None] * size + columns[None, :]
    value = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(residual + rows[:, None] * residual_stride + columns[None, :], mask, 0.0)
        rounded = (value + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask)
        value = rounded.to(tl.float32)  # what the backward will read
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / size + EPS)
    scale = tl.load(weight + columns, columns < size, 0.0).to(tl.float32)
    out = value * inverse[:, None] * scale[None, :]
    tl.store(normed + places, out.to(normed.dtype.element_ty), mask)
    tl.store(rstd + rows, inverse, rows < num_rows)


@triton.jit
def _backward_kernel(
    d_normed, d_total, x, weight, rstd, dx, d_weight,
    num_rows, size, x_stride, d_normed_stride, d_total_stride,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    scale = tl.load(weight + columns, columns < size, 0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in range(tl.program_id(0) * ROWS, num_rows, step):
        rows = first + tl.arange(0, ROWS).to(tl.int64)
        mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
        value = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask, 0.0)
        grad = tl.load(d_normed + rows[:, None] * d_normed_stride + columns[None, :], mask, 0.0)
        inverse = tl.load(rstd + rows, rows < num_rows, 0.0)[:, None]
        grad = grad.to(tl.float32)
        unit = value.to(tl.float32) * inverse
        scaled = grad * scale
        along = tl.sum(scaled * unit, axis=1) / size
        out = (scaled - unit * along[:, None]) * inverse
        if ADD:
            passed = tl.load(d_total + rows[:, None] * d_total_stride + columns[None, :], mask, 0.0)
            out += passed.to(tl.float32)
        tl.store(dx + rows[:, None] * size + columns[None, :], out.to(dx.dtype.element_ty), mask)
        if WEIGHT:
            weight_sum += grad * unit
    if WEIGHT:
        place = d_weight + tl.program_id(0).to(tl.int64) * size + columns
        tl.store(place, tl.sum(weight_sum, axis=0), columns < size)


def _tile(size: int) -> dict[str, int]:
    """Choose a tile of whole rows of ``size`` elements."""
    columns = next_power_of_2(size)
    rows = max(1, _TILE // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": num_warps(rows * columns)}


@triton_op("llmtrain::rms_norm", mutates_args={})
def _norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, size = x_TD.shape
    normed = x_TD.new_empty((num_rows, size))
    rstd = x_TD.new_empty(num_rows, dtype=torch.float32)
    if x_TD.numel():
        tile = _tile(size)
        wrap_triton(_forward_kernel)[(triton.cdiv(num_rows, tile["ROWS"]),)](
            x_TD, x_TD, weight_D, normed, normed, rstd,
            num_rows, size, x_TD.stride(0), 0, EPS=eps, ADD=False, **tile,
        )  # fmt: skip
    return normed, rstd


@triton_op("llmtrain::add_rms_norm", mutates_args={})
def _add_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, size = x_TD.shape
    normed, total = x_TD.new_empty((num_rows, size)), x_TD.new_empty((num_rows, size))
    rstd = x_TD.new_empty(num_rows, dtype=torch.float32)
    if x_TD.numel():
        tile = _tile(size)
        wrap_triton(_forward_kernel)[(triton.cdiv(num_rows, tile["ROWS"]),)](
            x_TD, residual_TD, weight_D, normed, total, rstd,
            num_rows, size, x_TD.stride(0), residual_TD.stride(0), EPS=eps, ADD=True, **tile,
        )  # fmt: skip
    return normed, total, rstd


@triton_op("llmtrain::rms_norm_backward", mutates_args={})
def _norm_backward(
    d_normed_TD: Tensor,
    d_total_TD: Tensor | None,
    x_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of what was normalised and, where asked for, that of the weight."""
    num_rows, size = x_TD.shape
    dx = x_TD.new_empty((num_rows, size))
    tile = _tile(max(size, 1))
    programs = min(triton.cdiv(num_rows, tile["ROWS"]), programs_per_device(x_TD.device))
    partial = weight_D.new_empty((programs if weight_gradient else 0, size), dtype=torch.float32)
    if x_TD.numel():
        passed = d_normed_TD if d_total_TD is None else d_total_TD
        wrap_triton(_backward_kernel)[(programs,)](
            d_normed_TD, passed, x_TD, weight_D, rstd_T, dx, partial,
            num_rows, size, x_TD.stride(0), d_normed_TD.stride(0), passed.stride(0),
            ADD=d_total_TD is not None, WEIGHT=weight_gradient, **tile,
        )  # fmt: skip
    return dx, partial.sum(dim=0).to(weight_D.dtype)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx: Any, d_normed: Tensor | None, _: None) -> tuple[Any, ...]:
    if d_normed is None:
        return None, None, None
    dx, d_weight = _norm_backward(
        as_rows(d_normed), None, *ctx.saved_tensors, ctx.needs_input_grad[1]
    )
    return dx, d_weight if ctx.needs_input_grad[1] else None, None


def _keep_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate_add_norm(
    ctx: Any, d_normed: Tensor | None, d_total: Tensor | None, _: None
) -> tuple[Any, ...]:
    if d_normed is None:
        return d_total, d_total, None, None
    total, weight, rstd = ctx.saved_tensors
    passed = None if d_total is None else as_rows(d_total)
    dx, d_weight = _norm_backward(
        as_rows(d_normed), passed, total, weight, rstd, ctx.needs_input_grad[2]
    )
    return dx, dx, d_weight if ctx.needs_input_grad[2] else None, None


_norm.register_autograd(_differentiate_norm, setup_context=_keep_norm)
_add_norm.register_autograd(_differentiate_add_norm, setup_context=_keep_add_norm)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim of ``x`` [..., D] and scale it by ``weight`` [D]."""
    if x.dtype == torch.float64:
        return plain.rms_norm(x, weight, eps)
    normed: Tensor = _norm(as_rows(x), weight.contiguous(), eps)[0]
    return normed.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised sum and the sum of ``x`` and ``residual``, both [..., D]."""
    if x.dtype == torch.float64:
        return plain.add_rms_norm(x, residual, weight, eps)
    normed, total, _ = _add_norm(as_rows(x), as_rows(residual), weight.contiguous(), eps)
    return normed.view(x.shape), total.view(x.shape)
