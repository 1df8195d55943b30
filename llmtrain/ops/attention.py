"""Scaled dot-product attention inside documents, behind one signature for every backend.

Invariant: a query sees the keys of its own document at its own or an earlier position, at most
``sliding_window`` tokens back, and nothing else, whichever backend runs and wherever in the
sequence the keys came from (the whole row, a cache, another rank's part).

    spec = AttentionSpec.within(positions, document_ids, sliding_window=None)
    out, lse = select_attention("auto", torch.device("cpu"))(q, k, v, spec)
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionSpec:
    """Which keys each query sees; built once per forward and shared by all layers."""

    q_positions: Tensor
    """Position of each query inside its document, int [B, S]."""
    q_document_ids: Tensor
    """Document of each query, int [B, S]; unique inside a row."""
    kv_positions: Tensor
    """Position of each key inside its document, int [B, T]."""
    kv_document_ids: Tensor
    """Document of each key, int [B, T]."""
    sliding_window: int | None = None
    """Number of tokens, itself included, a query sees; null means all before it."""
    causal_rows: bool = False
    """The caller vouches that every row is one document and keys are the queries' own tokens."""
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def within(
        cls, positions: Tensor, document_ids: Tensor | None, sliding_window: int | None = None
    ) -> "AttentionSpec":
        """Attention of a row to itself; no ``document_ids`` means each row is one document."""
        documents = torch.zeros_like(positions) if document_ids is None else document_ids
        return cls(
            q_positions=positions,
            q_document_ids=documents,
            kv_positions=positions,
            kv_document_ids=documents,
            sliding_window=sliding_window,
            causal_rows=document_ids is None and sliding_window is None,
        )

    @cached_property
    def mask(self) -> Tensor:
        """True where a query may look, bool [B, 1, S, T]; computed on first use, then kept."""
        distance = self.q_positions[:, :, None] - self.kv_positions[:, None, :]
        seen = (distance >= 0) & (
            self.q_document_ids[:, :, None] == self.kv_document_ids[:, None, :]
        )
        if self.sliding_window is not None:
            seen &= distance < self.sliding_window
        return seen[:, None]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the mask as 0 and -inf to add to the scores; kept, so that layers share it."""
        if dtype not in self._biases:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._biases[dtype] = zeros.masked_fill_(~self.mask, -math.inf)
        return self._biases[dtype]


AttentionFunction = Callable[[Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, Tensor | None]]
"""(q [B, S, N, H], k [B, T, G, H], v [B, T, G, H], spec) -> (out [B, S, N, H], lse [B, N, S]).

``lse`` is the log of the softmax denominator of each query; None from a backend that hides it.
"""


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Run torch's fused attention; where each row is one document no mask is built."""
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if spec.causal_rows else spec.bias(q.dtype),
        is_causal=spec.causal_rows,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2), None


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Compute the definition in fp64; a query that sees nothing gives 0 with lse -inf."""
    groups = q.shape[2] // k.shape[2]
    keys, values = (t.double().repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bsnh,btnh->bnst", q.double(), keys) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~spec.mask, -math.inf)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()
    return torch.einsum("bnst,btnh->bsnh", weights, values).to(q.dtype), lse


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """One implementation and the reason, if any, why a device cannot run it."""

    function: AttentionFunction
    """The implementation."""
    available: Callable[[torch.device], str | None]
    """Reason why it cannot run on a device; None where it can."""


def _everywhere(device: torch.device) -> str | None:
    return None


ATTENTION: dict[str, AttentionBackend] = {
    "sdpa": AttentionBackend(sdpa_attention, _everywhere),
    "reference": AttentionBackend(reference_attention, _everywhere),
}
"""Backends by name, the fastest first."""


def select_attention(name: str, device: torch.device) -> AttentionFunction:
    """Choose the backend ``name``, or the fastest one ``device`` can run for ``auto``; log it.

    Raises:
        ConfigError: ``name`` is unknown, or its backend cannot run on ``device``.
    """
    if name != "auto" and name not in ATTENTION:
        raise ConfigError(f"engine.attention={name} is unknown; use one of auto, {_names()}")
    for candidate in ATTENTION if name == "auto" else (name,):
        reason = ATTENTION[candidate].available(device)
        if reason is None:
            logger.info("attention backend: %s on %s", candidate, device.type)
            return ATTENTION[candidate].function
        if name != "auto":
            raise ConfigError(f"engine.attention={name} cannot run on {device}: {reason}; use auto")
    raise ConfigError(f"no attention backend of {_names()} can run on {device}")


def _names() -> str:
    return ", ".join(ATTENTION)
