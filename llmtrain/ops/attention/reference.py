"""The definition of attention, in fp64: what every backend is held against.

out, lse = reference_attention(q, k, v, spec)
"""

import math

import torch
from torch import Tensor

from llmtrain.ops.attention.spec import AttentionSpec


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Compute the definition in fp64; a query that sees nothing gives 0 with lse -inf."""
    groups = q.shape[2] // k.shape[2]
    keys, values = (t.double().repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bsnh,btnh->bnst", q.double(), keys) / math.sqrt(q.shape[-1])
    if spec.softcap is not None:
        scores = spec.softcap * (scores / spec.softcap).tanh()
    scores = scores.masked_fill(~spec.mask, -math.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return torch.einsum("bnst,btnh->bsnh", weights, values).to(q.dtype), lse
