"""Linear head and cross entropy in one, in chunks of tokens, so that [T, V] logits never exist.

Invariant: the largest intermediate is [chunk_tokens, V]; loss and gradients equal those of
``F.cross_entropy(F.linear(hidden, weight), targets)``, also where the rows of the matrix are spread
over ranks. Gradients are computed chunk by chunk during the forward, while the logits are there,
and only scaled in the backward: no logits are recomputed.

    total, loss_T, lse_T = chunked_linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.ops.wide import takes_fp32

_CPU_LOGITS = 1 << 25
"""Logits that exist at one time on a CPU, at most: 128 MiB in fp32."""

_CACHED_LOGITS = 1 << 19
"""Logits that all passes run over before the next ones, on a CPU: 2 MiB in fp32."""

_PRODUCT_ROWS = 1 << 12
"""Rows of the head's matrix that are taken at a time where a product needs another type."""

_LEAST_CHUNK = 256
"""Tokens that this limit leaves: fewer would read the matrix of the head too often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabPartition:
    """Which rows of the vocabulary a head holds, and how those who hold the rest are reached."""

    start: int
    """Token id of the first row held here; the matrix has as many rows as are held."""
    sum: Callable[[Tensor], Tensor]
    """Gives the elementwise sum over all parts; every part calls it with the same shape."""
    max: Callable[[Tensor], Tensor]
    """Gives the elementwise maximum over all parts, likewise."""


CrossEntropyStep = Callable[
    [Tensor, Tensor, VocabPartition | None, float, bool], tuple[Tensor, Tensor, Tensor]
]
"""(logits [T, V], targets [T], partition, z-loss weight, differentiate) -> (loss, lse, gradient).

Targets are ids in the whole vocabulary, none negative. Loss and log of the softmax denominator are
[T], fp32, or fp64 for fp64 logits. The gradient of the sum of losses and z-losses has the logits'
type and may be their memory: the caller has no more use for them. Without ``differentiate`` what
stands there means nothing.
"""


def chunked_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    chunk_tokens: int = 1024,
    partition: VocabPartition | None = None,
    z_loss_weight: float = 0.0,
    step: CrossEntropyStep | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of the losses of all targets and, detached, the loss of each.

    Args:
        hidden_TD: inputs of the head, [T, D]; the same on every part of the vocabulary.
        weight_VD: matrix of the head, [V, D], or this part's rows of it.
        targets_T: target ids in the whole vocabulary, int64 [T]; negative where there is none.
        weights_T: weight of each target, [T]; null means 1.
        chunk_tokens: tokens whose logits exist at one time, at most.
        partition: how the vocabulary is spread; null means that all of it is here.
        z_loss_weight: factor of the squared log of the softmax denominator that is added to the
            loss of each target (arXiv:2204.02311, section 5).
        step: from the logits of a chunk to losses and gradient; null means ``torch_step``.

    Returns:
        Scalar sum in nats, z-loss included, differentiable in ``hidden_TD`` and ``weight_VD``:
        with a partition the gradient of the hidden is this part's share, to be summed over parts.
        Cross entropy of each token [T], unweighted and without z-loss, and log of its softmax
        denominator [T]; both 0 where there is no target. fp32, or fp64 for fp64 inputs; with a
        partition the same bits on every part.
    """
    accumulate = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
    has_target = targets_T >= 0
    scale_T = has_target.to(accumulate)
    if weights_T is not None:
        scale_T = scale_T * weights_T.to(accumulate)
    differentiate = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    total, loss_T, lse_T = _ChunkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD,
        weight_VD,
        targets_T.clamp(min=0),
        scale_T,
        _Options(chunk_tokens, partition, z_loss_weight, differentiate, step or torch_step),
    )
    return total, loss_T * has_target, lse_T * has_target


@dataclass(frozen=True, slots=True)
class _Options:
    chunk_tokens: int
    partition: VocabPartition | None
    z_loss_weight: float
    differentiate: bool
    step: CrossEntropyStep


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Forward computes gradients too; ``scale_T`` is the weight of each target, 0 for none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        scale_T: Tensor,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute = _compute_dtype(weight_VD)
        on_cpu = weight_VD.device.type == "cpu"
        weight = weight_VD if on_cpu else weight_VD.to(compute)  # there in parts, to save memory
        count = _chunk_tokens(options.chunk_tokens, weight)
        loss_T, lse_T = torch.empty_like(scale_T), torch.empty_like(scale_T)
        grad_hidden = torch.empty_like(hidden_TD) if options.differentiate else None
        grad_weight = (
            torch.empty_like(weight_VD, dtype=scale_T.dtype)
            if options.differentiate and weight_VD.requires_grad
            else None
        )
        size = min(count, hidden_TD.shape[0]), weight.shape[0]
        logits = weight.new_empty(size, dtype=compute)
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, max(1, hidden_TD.shape[0]), count):
                part = slice(start, start + count)
                chunk = hidden_TD[part].to(compute)
                loss_T[part], lse_T[part], grad_logits = options.step(
                    _logits(chunk, weight, logits[: chunk.shape[0]]),
                    targets_T[part],
                    options.partition,
                    options.z_loss_weight,
                    options.differentiate,
                )
                if grad_hidden is None:
                    continue
                scale = scale_T[part, None]
                grad_hidden[part] = _product(grad_logits, weight) * scale
                if grad_weight is not None:
                    scaled = (chunk * scale).to(compute)
                    _add_product(grad_weight, grad_logits.T, scaled, keep=start > 0)
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_T, lse_T)
        total_T = loss_T
        if options.z_loss_weight:
            total_T = loss_T + options.z_loss_weight * lse_T.square()
        return (total_T * scale_T).sum(), loss_T, lse_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0]
        if grad_weight is not None:
            kept = torch._C._autograd._get_current_graph_task_keep_graph()
            grad_weight = grad_weight * factor if kept else grad_weight.mul_(factor)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return (grad_hidden * factor).to(grad_hidden.dtype), grad_weight, None, None, None


def torch_step(
    logits_TV: Tensor,
    targets_T: Tensor,
    partition: VocabPartition | None,
    z_loss_weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do a ``CrossEntropyStep`` in plain PyTorch, in fp32 at least; ``logits_TV`` may change.

    On a CPU a few rows at a time, which stay in its cache from one pass to the next.
    """
    num_tokens, vocab = logits_TV.shape
    rows = max(1, _CACHED_LOGITS // vocab)
    if partition is not None or logits_TV.device.type != "cpu" or rows >= num_tokens:
        return _rows_step(logits_TV, targets_T, partition, z_loss_weight, differentiate)
    losses, denominators = [], []
    for logits, targets in zip(
        torch.split(logits_TV, rows), torch.split(targets_T, rows), strict=True
    ):
        loss, lse, gradient = _rows_step(logits, targets, None, z_loss_weight, differentiate)
        if gradient.data_ptr() != logits.data_ptr():
            logits.copy_(gradient)
        losses.append(loss)
        denominators.append(lse)
    return torch.cat(losses), torch.cat(denominators), logits_TV


def _rows_step(
    logits_TV: Tensor,
    targets_T: Tensor,
    partition: VocabPartition | None,
    z_loss_weight: float,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = logits_TV.dtype
    logits_TV = logits_TV.to(torch.promote_types(dtype, torch.float32))
    index = targets_T[:, None]
    highest = logits_TV.amax(dim=1, keepdim=True)
    if partition is not None:
        highest = partition.max(highest)
        index = index - partition.start
        here = (index >= 0) & (index < logits_TV.shape[1])
        index = index.masked_fill(~here, 0)
    logits_TV -= highest
    at_target = logits_TV.gather(1, index)
    denominator = logits_TV.exp_().sum(dim=1, keepdim=True)
    if partition is not None:
        parts = torch.cat((at_target.masked_fill(~here, 0.0), denominator), dim=1)
        sums = partition.sum(parts)
        at_target, denominator = sums[:, :1], sums[:, 1:]
    log_denominator = denominator.log()
    lse = log_denominator + highest
    if differentiate:
        scale = denominator.reciprocal()
        if z_loss_weight:
            scale *= 1 + 2 * z_loss_weight * lse
        logits_TV *= scale
        minus_one = logits_TV.new_full((), -1.0).expand(index.shape)
        if partition is not None:
            minus_one = minus_one.masked_fill(~here, 0.0)
        logits_TV.scatter_add_(1, index, minus_one)
    gradient = logits_TV.to(dtype) if differentiate else logits_TV
    return (log_denominator - at_target)[:, 0], lse[:, 0], gradient


def _logits(chunk_TD: Tensor, weight_VD: Tensor, out_TV: Tensor) -> Tensor:
    """Write the product with the head's matrix to ``out_TV``, in the type of ``chunk_TD``."""
    for rows, weight in _rows_of(weight_VD, chunk_TD.dtype):
        torch.mm(chunk_TD, weight.T, out=out_TV[:, rows])
    return out_TV


def _product(grad_TV: Tensor, weight_VD: Tensor) -> Tensor:
    """Multiply with the head's matrix [V, D], in the type of ``grad_TV``."""
    if grad_TV.dtype == weight_VD.dtype:
        return grad_TV @ weight_VD
    total = grad_TV.new_zeros(grad_TV.shape[0], weight_VD.shape[1])
    for rows, weight in _rows_of(weight_VD, grad_TV.dtype):
        total.addmm_(grad_TV[:, rows], weight)
    return total


def _rows_of(weight_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the matrix in ``dtype``: as it is where it has that, else some rows at a time."""
    count = weight_VD.shape[0] if weight_VD.dtype == dtype else _PRODUCT_ROWS
    for start in range(0, weight_VD.shape[0], count):
        rows = slice(start, start + count)
        yield rows, weight_VD[rows].to(dtype)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of the products: autocast's where it is on, else the weight's.

    It is fp32 for bf16 on a CPU that is faster at fp32.
    """
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return torch.float32 if takes_fp32(weight) else weight.dtype


def _chunk_tokens(asked: int, weight: Tensor) -> int:
    """Return how many tokens to work on at a time: on a CPU fewer where the vocabulary is large.

    More would cost memory there and gain no speed.
    """
    if weight.device.type != "cpu":
        return asked
    return min(asked, max(_LEAST_CHUNK, _CPU_LOGITS // weight.shape[0]))


def _add_product(total: Tensor, a: Tensor, b: Tensor, keep: bool) -> None:
    """Add ``a @ b`` to ``total``, in place and without a copy where the types allow.

    Without ``keep`` what ``total`` held is forgotten. Else, on a CPU, the product is made some rows
    at a time: as a whole it would be, with what the library needs beside it, 1.5 times ``total``.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=1 if keep else 0)
        return
    rows = _PRODUCT_ROWS if total.device.type == "cpu" else total.shape[0]
    for start in range(0, total.shape[0], rows):
        some, factor = total[start : start + rows], a[start : start + rows]
        if keep:
            some += factor @ b
        else:
            some.copy_(factor @ b)
