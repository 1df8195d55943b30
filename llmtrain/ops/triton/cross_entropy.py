"""The step from logits to losses and gradient, in place: what the chunked head and loss needs.

Invariant: a program owns a row, so nothing is summed across programs; arithmetic is fp32. With the
whole vocabulary here, one launch reads the row twice and writes it once; the second reading runs
backwards, from the end that the L2 cache still holds, and a row a processor at a time (250 KB each
at 128k bf16 logits) fits there as a whole: 2TVb bytes of memory traffic for [T, V] logits of b
bytes. With a part of the vocabulary, maxima and sums are exchanged between two launches, 3TVb.

    loss_T, lse_T, gradient_TV = triton_step(logits_TV, targets_T, None, 0.0, True)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmtrain.ops.cross_entropy import VocabPartition, torch_step
from llmtrain.ops.triton.grid import next_power_of_2

_GROUP = tl.constexpr(8)
"""Neighbours that share a running maximum: a rescaling for each eight elements."""

_MAX_LANES = 1024
"""Groups a program works on at a time."""

_LOWEST = tl.constexpr(-3.0e38)
"""Below every logit; finite, so that a difference of two is 0."""


@triton.jit
def _statistics(row, size, LANES: tl.constexpr):
    """Return the maximum of a row and the sum of the exponentials of what is left above it."""
    offsets = tl.arange(0, LANES)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    highest = tl.full([LANES], _LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, size, LANES * _GROUP):
        mask = offsets < size - start
        value = tl.load(row + start + offsets, mask, 0.0, eviction_policy="evict_last")
        value = tl.where(mask, value.to(tl.float32), _LOWEST)
        higher = tl.maximum(highest, tl.max(value, axis=1))
        share = tl.where(mask, tl.exp(value - higher[:, None]), 0.0)
        total = total * tl.exp(highest - higher) + tl.sum(share, axis=1)
        highest = higher
    top = tl.max(highest, axis=0)
    return top, tl.sum(total * tl.exp(highest - top), axis=0)


@triton.jit
def _write_gradient(row, size, target, lse, factor, LANES: tl.constexpr):
    """Replace a row of logits by ``factor`` times its softmax, less one at the target."""
    offsets = tl.arange(0, LANES)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    blocks = tl.cdiv(size, LANES * _GROUP)
    for number in range(blocks):
        places = (blocks - 1 - number) * LANES * _GROUP + offsets
        mask = places < size
        value = tl.load(row + places, mask, 0.0, eviction_policy="evict_first").to(tl.float32)
        gradient = tl.exp(value - lse) * factor - tl.where(places == target, 1.0, 0.0)
        tl.store(row + places, gradient.to(row.dtype.element_ty), mask)


@triton.jit
def _whole_kernel(
    logits, targets, loss, lse, size, stride,
    Z: tl.constexpr, WRITE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    target = tl.load(targets + number)
    at_target = tl.load(row + target).to(tl.float32)
    top, total = _statistics(row, size, LANES)
    log_total = tl.log(total)
    denominator = log_total + top
    tl.store(loss + number, log_total - (at_target - top))
    tl.store(lse + number, denominator)
    if WRITE:
        tl.debug_barrier()  # the target's logit has been read by all
        _write_gradient(row, size, target, denominator, 1.0 + 2.0 * Z * denominator, LANES)


@triton.jit
def _statistics_kernel(
    logits, targets, tops, totals, at_targets, start, size, stride, LANES: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    target = tl.load(targets + number) - start
    here = (target >= 0) & (target < size)
    tl.store(at_targets + number, tl.load(row + target, here, 0.0).to(tl.float32))
    top, total = _statistics(row, size, LANES)
    tl.store(tops + number, top)
    tl.store(totals + number, total)


@triton.jit
def _gradient_kernel(
    logits, targets, lse, start, size, stride, Z: tl.constexpr, LANES: tl.constexpr
):
    number = tl.program_id(0).to(tl.int64)
    denominator = tl.load(lse + number)
    target = tl.load(targets + number) - start
    factor = 1.0 + 2.0 * Z * denominator
    _write_gradient(logits + number * stride, size, target, denominator, factor, LANES)


def triton_step(
    logits_TV: Tensor,
    targets_T: Tensor,
    partition: VocabPartition | None,
    z_loss_weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do a ``CrossEntropyStep``; the gradient takes the place of ``logits_TV``."""
    if logits_TV.dtype == torch.float64 or not logits_TV.numel():
        return torch_step(logits_TV, targets_T, partition, z_loss_weight, differentiate)
    logits_TV, targets_T = logits_TV.contiguous(), targets_T.contiguous()
    if partition is not None:
        return _step_of_part(logits_TV, targets_T, partition, z_loss_weight, differentiate)
    num_rows, size = logits_TV.shape
    loss_T, lse_T = logits_TV.new_empty((2, num_rows), dtype=torch.float32)
    _whole_kernel[(num_rows,)](
        logits_TV, targets_T, loss_T, lse_T, size, logits_TV.stride(0),
        Z=z_loss_weight, WRITE=differentiate, **_lanes(size),
    )  # fmt: skip
    return loss_T, lse_T, logits_TV


def _step_of_part(
    logits_TV: Tensor,
    targets_T: Tensor,
    partition: VocabPartition,
    z_loss_weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange maxima and sums with those who hold the rest of the vocabulary."""
    num_rows, size = logits_TV.shape
    tops, totals, at_targets = logits_TV.new_empty((3, num_rows), dtype=torch.float32)
    shape = {"start": partition.start, "size": size, "stride": logits_TV.stride(0)}
    _statistics_kernel[(num_rows,)](
        logits_TV, targets_T, tops, totals, at_targets, **shape, **_lanes(size)
    )
    highest = partition.max(tops)
    row = targets_T - partition.start
    here = (row >= 0) & (row < size)
    at_targets = torch.where(here, at_targets - highest, 0.0)
    sums = partition.sum(torch.stack((at_targets, totals * (tops - highest).exp())))
    log_total = sums[1].log()
    lse_T = log_total + highest
    if differentiate:
        _gradient_kernel[(num_rows,)](
            logits_TV, targets_T, lse_T, **shape, Z=z_loss_weight, **_lanes(size)
        )
    return log_total - sums[0], lse_T, logits_TV


def _lanes(size: int) -> dict[str, int]:
    """Choose the groups of a program; with 1,024 it takes half a processor's threads."""
    lanes = min(_MAX_LANES, next_power_of_2(triton.cdiv(size, _GROUP.value)))
    return {"LANES": lanes, "num_warps": max(1, lanes // 32)}
