"""Ring attention: keys and values go round the ranks while each computes on those it has.

Invariant: no scores outlive a block, and between forward and backward a rank keeps its own q, k, v,
its output and one number (lse) per query: the backward sends keys and values round once more and
lets their gradients travel with them, home at the end. Sums are fp32 at least.

    out, lse = ring_attention(q, k, v, blocks, block_attention(sdpa_attention), group)

The method is arXiv:2310.01889; partial results are joined as in arXiv:2205.14135.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmtrain.ops.attention.spec import AttentionSpec, BlockAttention

_KEYS, _GRADIENTS = 0, 1
"""Tags of what travels, so that two messages to one peer are not mixed up."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries of this rank and the keys they may see of one rank."""

    queries: slice
    """Queries of this rank's part."""
    keys: slice
    """Keys of the part that is visiting."""
    spec: AttentionSpec
    """Which of these keys each of these queries sees."""


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Sequence[Sequence[Block]],
    attention: BlockAttention,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Attend to the keys of all ranks of ``group``.

    Args:
        q: this rank's queries [B, S, N, H].
        k: this rank's keys [B, S, G, H]; every rank has as many.
        v: this rank's values [B, S, G, H].
        blocks: for each rank of the group, what to compute while its keys are here; pairs that
            no block names are not computed.
        attention: computes a block.
        group: the ranks of the ring.

    Returns:
        Out [B, S, N, H] and lse [B, N, S]; no gradient flows from lse.
    """
    out, lse = _Ring.apply(q, k, v, blocks, attention, group)  # type: ignore[no-untyped-call]
    return out, lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Sequence[Sequence[Block]],
        attention: BlockAttention,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        rank, size = group.rank(), group.size()
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        lse = out.new_full((q.shape[0], q.shape[2], q.shape[1]), -math.inf)
        here = torch.stack((k, v))
        for step in range(size):
            coming = _Transfer(here, group, _KEYS) if step + 1 < size else None
            for block in blocks[(rank - step) % size]:
                keys, values = here[:, :, block.keys]
                part = attention.forward(q[:, block.queries], keys, values, block.spec)
                _join(out[:, block.queries], lse[:, :, block.queries], *part)
            if coming is not None:
                here = coming.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.attention, ctx.group = blocks, attention, group
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        rank, size = ctx.group.rank(), ctx.group.size()
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)

        def add_shares(here: Tensor, blocks: Sequence[Block]) -> Tensor:
            """Add to dq what the visiting keys and values give; return their own gradients."""
            added = torch.zeros(here.shape, dtype=lse.dtype, device=here.device)
            for block in blocks:
                mine = block.queries
                keys, values = here[:, :, block.keys]
                share = ctx.attention.backward(
                    dout[:, mine], q[:, mine], keys, values, out[:, mine], lse[:, :, mine],
                    block.spec,
                )  # fmt: skip
                dq[:, mine] += share[0]
                added[0, :, block.keys] += share[1]
                added[1, :, block.keys] += share[2]
            return added

        here = torch.stack((k, v))
        coming = _Transfer(here, ctx.group, _KEYS)
        gradients = _Transfer(add_shares(here, ctx.blocks[rank]), ctx.group, _GRADIENTS)
        for step in range(1, size):
            here = coming.wait()
            if step + 1 < size:
                coming = _Transfer(here, ctx.group, _KEYS)
            added = add_shares(here, ctx.blocks[(rank - step) % size])
            gradients = _Transfer(added.add_(gradients.wait()), ctx.group, _GRADIENTS)
        dk, dv = gradients.wait().to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


def _join(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Add attention to further keys to ``out`` [B, S, N, H] and ``lse`` [B, N, S], in place."""
    joined = torch.logaddexp(lse, new_lse)
    reference = joined.masked_fill(joined == -math.inf, 0.0)
    old_share, new_share = (
        (x - reference).exp().transpose(1, 2)[..., None] for x in (lse, new_lse)
    )
    out.mul_(old_share).add_(new_out * new_share)
    lse.copy_(joined)


class _Transfer:
    """A tensor on its way to the next rank while one of its shape comes from the previous."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup, tag: int) -> None:
        self._sent, self._received = sent, torch.empty_like(sent)
        rank, size = group.rank(), group.size()
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, group=group, tag=tag, group_peer=(rank + 1) % size),
                dist.P2POp(
                    dist.irecv, self._received, group=group, tag=tag, group_peer=(rank - 1) % size
                ),
            ]
        )

    def wait(self) -> Tensor:
        """Return what came; what was sent may be overwritten from now on."""
        for work in self._works:
            work.wait()
        return self._received
