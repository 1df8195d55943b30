"""Attention to a block of the keys by products of matrices, forward and backward.

Invariant: nothing is kept between the two but one number (lse) per query, and no more than
``_MAX_SCORES`` scores exist at one time.

    out, lse = PLAIN_BLOCKS.forward(q, k[:, keys], v[:, keys], spec.part(queries, keys))
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from llmtrain.ops.attention.spec import AttentionSpec, BlockAttention

_MAX_SCORES = 1 << 24
"""Scores of a block that exist at one time; more queries are worked off in chunks."""


def in_chunks(spec: AttentionSpec, heads: int) -> Iterator[tuple[slice, AttentionSpec]]:
    """Cut the queries so that ``heads`` score matrices stay small; what fits is not cut."""
    rows, length = spec.q_positions.shape
    count = max(1, _MAX_SCORES // (rows * spec.kv_positions.shape[1] * heads))
    if count >= length:
        yield slice(0, length), spec
        return
    keys = slice(0, spec.kv_positions.shape[1])
    for start in range(0, length, count):
        queries = slice(start, min(start + count, length))
        yield queries, spec.part(queries, keys)


def _plain_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, least: torch.dtype
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, least)
    keys, values = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for queries, part in in_chunks(spec, q.shape[2]):
        scores, _ = _scores(q[:, queries].to(dtype), keys, part)
        lse = scores.logsumexp(dim=-1)
        weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
        outs.append(torch.einsum("bgrst,btgh->bsgrh", weights, values).flatten(2, 3))
        lses.append(lse.flatten(1, 2))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: AttentionSpec,
    least: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, least)
    keys, values, dout = k.to(dtype), v.to(dtype), dout.to(dtype)
    by_group = (k.shape[2], -1)
    lse = torch.unflatten(lse.to(dtype).masked_fill(lse == -math.inf, 0.0), 1, by_group)
    delta = torch.unflatten((dout * out.to(dtype)).sum(-1).transpose(1, 2), 1, by_group)
    dqs, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows, part in in_chunks(spec, q.shape[2]):
        queries = q[:, rows].to(dtype)
        scores, slope = _scores(queries, keys, part)
        weights = (scores - lse[:, :, :, rows, None]).exp()
        douts = torch.unflatten(dout[:, rows], 2, by_group)
        dv += torch.einsum("bgrst,bsgrh->btgh", weights, douts)
        dweights = torch.einsum("bsgrh,btgh->bgrst", douts, values)
        dscores = weights * (dweights - delta[:, :, :, rows, None]) / math.sqrt(q.shape[-1])
        dscores = dscores if slope is None else dscores * slope
        dqs.append(torch.einsum("bgrst,btgh->bsgrh", dscores, keys).flatten(2, 3))
        dk += torch.einsum("bgrst,bsgrh->btgh", dscores, torch.unflatten(queries, 2, by_group))
    return torch.cat(dqs, dim=1), dk, dv


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """Scaled, capped scores [B, G, N / G, S, T], -inf where a query may not look; the cap's slope.

    The slope is None without a cap.
    """
    grouped = torch.unflatten(q, 2, (k.shape[2], -1))
    scores = torch.einsum("bsgrh,btgh->bgrst", grouped, k) / math.sqrt(q.shape[-1])
    slope = None
    if spec.softcap is not None:
        share = (scores / spec.softcap).tanh()
        scores, slope = share * spec.softcap, 1 - share.square()
    return scores.masked_fill(~spec.mask[:, :, None], -math.inf), slope


PLAIN_BLOCKS = BlockAttention(
    partial(_plain_forward, least=torch.float32), partial(_plain_backward, least=torch.float32)
)
"""Products of matrices in fp32 at least, on every device."""

REFERENCE_BLOCKS = BlockAttention(
    partial(_plain_forward, least=torch.float64), partial(_plain_backward, least=torch.float64)
)
"""The same in fp64."""
