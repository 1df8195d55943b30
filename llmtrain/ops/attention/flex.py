"""Torch's flex_attention with a mask of blocks: whole blocks that no query sees are not computed.

Invariant: the mask of blocks is made once per forward and shared by all layers; inside a compiled
block the attention is compiled with it, elsewhere it compiles itself once.

    out, lse = flex_attention(q, k, v, AttentionSpec.within(positions, document_ids))

The method is arXiv:2412.05496.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from llmtrain.ops.attention.spec import AttentionSpec, Needs


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Run flex_attention; compiled on a GPU, where it runs at all outside tests."""
    run = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else flex.flex_attention
    out = run(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        score_mod=_capped(spec.softcap), block_mask=block_mask(spec), enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2), None


def block_mask(spec: AttentionSpec) -> Any:
    """Give the mask of blocks of ``spec``, made once."""
    return spec.derived("block mask", lambda: _block_mask(spec))


def _block_mask(spec: AttentionSpec) -> Any:
    q_positions, kv_positions = spec.q_positions, spec.kv_positions
    q_documents, kv_documents = spec.q_document_ids, spec.kv_document_ids
    window = spec.sliding_window or q_positions.shape[1] + kv_positions.shape[1]

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        del head
        distance = q_positions[row, query] - kv_positions[row, key]
        same = q_documents[row, query] == kv_documents[row, key]
        return same & (distance >= 0) & (distance < window)

    rows, num_q = q_positions.shape
    return flex.create_block_mask(
        seen, B=rows, H=None, Q_LEN=num_q, KV_LEN=kv_positions.shape[1], device=q_positions.device
    )


@functools.cache
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    """Make the function of a score; one object for each cap, so that nothing compiles again."""
    if softcap is None:
        return None

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex.flex_attention, dynamic=False)


def flex_available(device: torch.device) -> str | None:
    """Tell why flex_attention cannot run."""
    if device.type != "cuda":
        return f"flex_attention has no backward on a {device.type}"
    from torch.utils._triton import has_triton

    return None if has_triton() else "flex_attention needs Triton: pip install triton"


def flex_supports(needs: Needs, device: torch.device) -> str | None:
    """Tell what flex_attention cannot."""
    del device
    if needs.dtype is torch.float64:
        return "it does not compute in float64"
    if needs.head_size < 16:
        return f"heads have 16 elements or more; found {needs.head_size}"
    return None
