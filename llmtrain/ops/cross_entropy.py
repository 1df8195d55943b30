"""Linear head and cross entropy in one, in chunks of tokens, so that [T, V] logits never exist.

Invariant: the largest intermediate is [chunk_tokens, V]; loss and gradients equal those of
``F.cross_entropy(F.linear(hidden, weight), targets)``. Gradients are computed chunk by chunk during
the forward, while the logits are there, and only scaled in the backward: no logits are recomputed.

    loss_sum, loss_T = chunked_linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
"""

from typing import Any

import torch
from torch import Tensor


def chunked_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses of all targets and, detached, the loss of each.

    Args:
        hidden_TD: inputs of the head, [T, D].
        weight_VD: matrix of the head, [V, D].
        targets_T: target ids, int64 [T]; negative where there is none.
        weights_T: weight of each target, [T]; null means 1.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        Scalar sum in nats, differentiable in ``hidden_TD`` and ``weight_VD``; unweighted loss of
        each token [T], 0 where there is no target. fp32, or fp64 for fp64 inputs.
    """
    accumulate = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
    has_target = targets_T >= 0
    scale_T = has_target.to(accumulate)
    if weights_T is not None:
        scale_T = scale_T * weights_T.to(accumulate)
    differentiate = torch.is_grad_enabled() and (hidden_TD.requires_grad or weight_VD.requires_grad)
    loss_sum, loss_T = _ChunkedLinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TD, weight_VD, targets_T.clamp(min=0), scale_T, chunk_tokens, differentiate
    )
    return loss_sum, loss_T * has_target


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Forward computes gradients too; ``scale_T`` is the weight of each target, 0 for none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        scale_T: Tensor,
        chunk_tokens: int,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        compute = _compute_dtype(weight_VD)
        weight = weight_VD.to(compute)
        loss_T = torch.empty_like(scale_T)
        grad_hidden = torch.empty_like(hidden_TD) if differentiate else None
        grad_weight = (
            torch.zeros_like(weight_VD, dtype=scale_T.dtype)
            if differentiate and weight_VD.requires_grad
            else None
        )
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, hidden_TD.shape[0], chunk_tokens):
                part = slice(start, start + chunk_tokens)
                chunk = hidden_TD[part].to(compute)
                logp = torch.log_softmax(chunk @ weight.T, dim=-1, dtype=scale_T.dtype)
                index = targets_T[part, None]
                loss_T[part] = -logp.gather(1, index)[:, 0]
                if grad_hidden is None:
                    continue
                grad_logits = logp.exp_().scatter_add_(
                    1, index, logp.new_full((), -1.0).expand(index.shape)
                )
                scale = scale_T[part, None]
                grad_logits = grad_logits.to(compute)
                grad_hidden[part] = (grad_logits @ weight) * scale
                if grad_weight is not None:
                    _add_product(grad_weight, grad_logits.T, (chunk * scale).to(compute))
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(loss_T)
        return (loss_T * scale_T).sum(), loss_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * factor).to(ctx.weight_dtype)
        return (grad_hidden * factor).to(grad_hidden.dtype), grad_weight, None, None, None, None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of the products: autocast's where it is on, else the weight's."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, in place and without a copy where the types allow."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
