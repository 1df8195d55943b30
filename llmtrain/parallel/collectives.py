"""Collectives along one dim of an activation, each with the collective that is its gradient.

Invariant: what a rank holds is always an equal part, ordered by rank, and sums over ranks are taken
in rank order on the CPU. Gathering and reduce-scattering are each other's gradient; an all-to-all's
is the all-to-all back. All run eagerly and inside ``torch.compile``. Dims count from 0.

    whole_BSD = gather_along(part_BSD, 1, group)          # backward: sum over ranks, own part
    part_BSD = reduce_scatter_along(partial_BSD, 1, group)  # backward: gather
    heads_BSNH = all_to_all(tokens_BSNH, 2, 1, group)     # fewer heads of more tokens
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.errors import LayoutError

# torch 2.13 renamed these two and warns about the old names, which 2.11 and 2.12 have alone.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather_along(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the parts of all ranks along ``dim``; gradients are summed over the ranks."""
    out: Tensor = _Gather.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return out


def reduce_scatter_along(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum ``x`` over the ranks and give each its part of ``dim``; gradients are gathered.

    Raises:
        LayoutError: the ranks do not divide ``dim``.
    """
    out: Tensor = _ReduceScatter.apply(x, dim, group)  # type: ignore[no-untyped-call]
    return out


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, group: dist.ProcessGroup) -> Tensor:
    """Send part i of ``split_dim`` to rank i; concatenate what arrives along ``concat_dim``.

    Raises:
        LayoutError: the ranks do not divide ``split_dim``.
    """
    out: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
        x, split_dim, concat_dim, group
    )
    return out


def stack_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Stack the tensors of all ranks in rank order, [ranks, *x.shape]; carries no gradient."""
    out = x.new_empty((group.size(), *x.shape))
    _all_gather(out.view(-1), x.detach().reshape(-1), group=group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _sum_and_scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _sum_and_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, split_dim: int, concat_dim: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.dims, ctx.group = (split_dim, concat_dim), group
        return _unstack(_exchange(_parts(x, split_dim, group), group), concat_dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        parts = _exchange(_parts(grad, concat_dim, ctx.group), ctx.group)
        return _unstack(parts, split_dim), None, None, None


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return _unstack(stack_over(x, group), dim)


def _sum_and_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    parts = _parts(x, dim, group)
    if not x.is_cuda:  # gloo's own reduce-scatter takes 2 to 8 times as long (2 and 4 ranks)
        return _exchange(parts, group).sum(dim=0)
    out = torch.empty_like(parts[0])
    _reduce_scatter(out.view(-1), parts.view(-1), group=group)
    return out


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send row i of [ranks, ...] to rank i; row i of the result came from rank i."""
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def _parts(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Cut ``dim`` in equal parts, one for each rank, stacked in front."""
    ranks, size = group.size(), x.shape[dim]
    if size % ranks:
        raise LayoutError(
            f"{ranks} ranks cannot share dim {dim} of {tuple(x.shape)} evenly; "
            f"use a size that {ranks} divides, found {size}"
        )
    shape = (*x.shape[:dim], ranks, size // ranks, *x.shape[dim + 1 :])
    return x.reshape(shape).movedim(dim, 0).contiguous()


def _unstack(parts: Tensor, dim: int) -> Tensor:
    """Concatenate the rows of [ranks, ...] along ``dim`` of what remains."""
    return parts.movedim(0, dim).flatten(dim, dim + 1)
