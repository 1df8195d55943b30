"""Attention over segments of variable length as one operation, whichever library computes it.

Invariant: compilers, recomputation and tracing see ``llmtrain::attention_forward`` and
``attention_backward`` and nothing inside; how many documents there are and where they begin is in
tensors, so no batch compiles anything again. Where keys are not a run of tokens that a kernel
understands, products of matrices with a mask run instead.

    attention = segmented_attention("documents")
    out, lse = attention(q, k, v, AttentionSpec.within(positions, document_ids))
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from llmtrain.ops.attention.documents import DOCUMENTS
from llmtrain.ops.attention.flash import FLASH2, FLASH3, FLASH4, TORCH_VARLEN
from llmtrain.ops.attention.kernel import Call, Kernel
from llmtrain.ops.attention.sdpa import SDPA_BLOCKS, sdpa_attention
from llmtrain.ops.attention.segments import segments_of
from llmtrain.ops.attention.spec import AttentionFunction, AttentionSpec, BlockAttention

KERNELS: dict[str, Kernel] = {
    "documents": DOCUMENTS,
    "flash3": FLASH3,
    "flash4": FLASH4,
    "flash2": FLASH2,
    "varlen": TORCH_VARLEN,
}
"""Kernels by the name that ``segmented_attention`` takes."""


_TAGS = (torch.Tag.cudagraph_unsafe,)
"""How many segments there are is read on the host at every run."""


def _call(
    cu_q: Tensor, cu_k: Tensor, extent: Tensor, order: str, window: int, softcap: float
) -> Call:
    num, max_q, max_k = extent.tolist()
    return Call(
        cu_q=cu_q[: num + 1], cu_k=cu_k[: num + 1], max_q=max_q, max_k=max_k,
        causal=order != "earlier", window=window, softcap=softcap,
    )  # fmt: skip


def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    extent: Tensor,
    order: str,
    window: int,
    softcap: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Attend; q [B, S, N, H], k and v [B, T, G, H] to out [B, S, N, H] and lse [N, B S]."""
    call = _call(cu_q, cu_k, extent, order, window, softcap)
    out, lse = KERNELS[kernel].forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), call)
    if order != "own":
        blind = ~call.with_queries(call.cu_q, call.cu_k, out.shape[0])
        out = out.masked_fill(blind[:, None, None], 0.0)
        lse = lse.masked_fill(blind, -math.inf)
    return out.reshape(q.shape), lse.contiguous()


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((q.shape[2], q.shape[0] * q.shape[1]), dtype=wide)
    return q.new_empty(q.shape), lse


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    extent: Tensor,
    order: str,
    window: int,
    softcap: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give the gradients of q, k and v; ``lse`` [N, B S]."""
    call = _call(cu_q, cu_k, extent, order, window, softcap)
    dq, dk, dv = KERNELS[kernel].backward(
        dout.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
        out.flatten(0, 1), lse, call,
    )  # fmt: skip
    if order != "own":  # kernels leave what belongs to no pair as they found it
        dq = dq.masked_fill(
            ~call.with_queries(call.cu_q, call.cu_k, dq.shape[0])[:, None, None], 0.0
        )
        unseen = ~call.with_queries(call.cu_k, call.cu_q, dk.shape[0])[:, None, None]
        dk, dv = dk.masked_fill(unseen, 0.0), dv.masked_fill(unseen, 0.0)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _backward_shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_LIBRARY: Any = torch.library.Library("llmtrain", "FRAGMENT")  # type: ignore[no-untyped-call]
"""Where the operations live; they stay as long as it does."""

for _function, _shapes in (
    (_attention_forward, _forward_shapes),
    (_attention_backward, _backward_shapes),
):
    _name = _function.__name__.removeprefix("_")
    # not torch.library.custom_op, whose first call imports the compiler: 1.5 s
    _LIBRARY.define(_name + torch.library.infer_schema(_function, mutates_args=()), tags=_TAGS)
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmtrain::{_name}", _shapes, lib=_LIBRARY)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, extent, *options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, extent)
    ctx.options = options


def _gradients(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv = torch.ops.llmtrain.attention_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, *[None] * 7


torch.library.register_autograd(
    "llmtrain::attention_forward", _gradients, setup_context=_save, lib=_LIBRARY
)


class _Attend(torch.autograd.Function):
    """The same gradient at half the overhead where nothing is compiled."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output: tuple[Tensor, Tensor] = torch.ops.llmtrain.attention_forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dout, dlse)


@register_flop_formula(torch.ops.llmtrain.attention_forward)
def _forward_flops(
    q: tuple[int, ...], k: tuple[int, ...], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return 4 * math.prod(q) * k[1]


@register_flop_formula(torch.ops.llmtrain.attention_backward)
def _backward_flops(
    dout: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    return 10 * math.prod(q) * k[1]


def _options(spec: AttentionSpec, kernel: str) -> tuple[str, int, float, str]:
    return spec.order, spec.sliding_window or 0, spec.softcap or 0.0, kernel


def segmented_attention(kernel: str) -> AttentionFunction:
    """Make the attention function of a kernel of KERNELS."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor | None]:
        segments = segments_of(spec)
        if segments is None:
            return sdpa_attention(q, k, v, spec)
        compiling = torch.compiler.is_compiling()
        attend_once: Any = torch.ops.llmtrain.attention_forward if compiling else _Attend.apply
        out, lse = attend_once(
            q, k, v, segments.cu_q, segments.cu_k, segments.extent, *_options(spec, kernel)
        )
        return out, lse.detach().unflatten(1, q.shape[:2]).transpose(0, 1)

    return attend


def segmented_blocks(kernel: str) -> BlockAttention:
    """Make the block form of a kernel of KERNELS."""

    def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        segments = segments_of(spec)
        if segments is None:
            return SDPA_BLOCKS.forward(q, k, v, spec)
        out, lse = torch.ops.llmtrain.attention_forward(
            q, k, v, segments.cu_q, segments.cu_k, segments.extent, *_options(spec, kernel)
        )
        return out, lse.unflatten(1, q.shape[:2]).transpose(0, 1)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        segments = segments_of(spec)
        if segments is None:
            return SDPA_BLOCKS.backward(dout, q, k, v, out, lse, spec)
        # a query that sees nothing anywhere has no pairs: what its lse is does not matter
        by_head = lse.masked_fill(lse == -math.inf, 0.0).transpose(0, 1).flatten(1).contiguous()
        dq, dk, dv = torch.ops.llmtrain.attention_backward(
            dout, q, k, v, out, by_head, segments.cu_q, segments.cu_k, segments.extent,
            *_options(spec, kernel),
        )  # fmt: skip
        return dq, dk, dv

    return BlockAttention(forward, backward)
