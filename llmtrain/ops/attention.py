"""Scaled dot-product attention inside documents, behind one signature for every backend.

Invariant: a query sees the keys of its own document at its own or an earlier position, at most
``sliding_window`` tokens back, and nothing else, whichever backend runs and wherever in the
sequence the keys came from (the whole row, a cache, another rank's part).

    spec = AttentionSpec.within(positions, document_ids, sliding_window=None)
    out, lse = select_attention("auto", torch.device("cpu"))(q, k, v, spec)

Every backend also works on a block of the keys, forward and backward, so that blocks which visit
one after the other (ring attention) add up to the whole without a score being kept.
"""

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_SCORES = 1 << 24
"""Scores of a block that exist at one time; more queries are worked off in chunks."""


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
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

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

    def part(self, queries: slice, keys: slice) -> "AttentionSpec":
        """Give the visibility of some keys to some queries of every row."""
        return AttentionSpec(
            q_positions=self.q_positions[:, queries],
            q_document_ids=self.q_document_ids[:, queries],
            kv_positions=self.kv_positions[:, keys],
            kv_document_ids=self.kv_document_ids[:, keys],
            sliding_window=self.sliding_window,
        )

    def derived(self, name: Hashable, build: Callable[[], T]) -> T:
        """Return what ``build`` makes of this spec: made at the first call, then kept.

        All layers share a spec, so what depends on it alone is computed once per forward.
        """
        if name not in self._derived:
            self._derived[name] = build()
        return cast(T, self._derived[name])

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

    @cached_property
    def blind(self) -> Tensor:
        """True for a query that sees no key at all, bool [B, 1, S]; kept."""
        return ~self.mask.any(dim=-1)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the mask as 0 and -inf to add to the scores; kept, so that layers share it."""

        def build() -> Tensor:
            zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            return zeros.masked_fill_(~self.mask, -math.inf)

        return self.derived(("bias", dtype), build)


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
class BlockAttention:
    """Attention to a block of the keys, as a forward and a backward that keep nothing between."""

    forward: Callable[[Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, Tensor]]
    """(q, k, v, spec) -> (out, lse) over this block alone, fp32 or fp64 where it can.

    A query that sees nothing in the block gets out 0 and lse -inf.
    """
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionSpec],
        tuple[Tensor, Tensor, Tensor],
    ]
    """(dout, q, k, v, out, lse, spec) -> this block's share of (dq, dk, dv).

    ``out`` and ``lse`` are those over all blocks (arXiv:2205.14135, algorithm 4 of 2307.08691).
    """


def _chunks(spec: AttentionSpec, heads: int) -> Iterator[tuple[slice, AttentionSpec]]:
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
    for queries, part in _chunks(spec, q.shape[2]):
        scores = _scores(q[:, queries].to(dtype), keys, part)
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
    for rows, part in _chunks(spec, q.shape[2]):
        queries = q[:, rows].to(dtype)
        weights = (_scores(queries, keys, part) - lse[:, :, :, rows, None]).exp()
        douts = torch.unflatten(dout[:, rows], 2, by_group)
        dv += torch.einsum("bgrst,bsgrh->btgh", weights, douts)
        dweights = torch.einsum("bsgrh,btgh->bgrst", douts, values)
        dscores = weights * (dweights - delta[:, :, :, rows, None]) / math.sqrt(q.shape[-1])
        dqs.append(torch.einsum("bgrst,btgh->bsgrh", dscores, keys).flatten(2, 3))
        dk += torch.einsum("bgrst,bsgrh->btgh", dscores, torch.unflatten(queries, 2, by_group))
    return torch.cat(dqs, dim=1), dk, dv


def _scores(q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
    """Scaled scores [B, G, N / G, S, T], -inf where a query may not look."""
    grouped = torch.unflatten(q, 2, (k.shape[2], -1))
    scores = torch.einsum("bsgrh,btgh->bgrst", grouped, k) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~spec.mask[:, :, None], -math.inf)


PLAIN_BLOCKS = BlockAttention(
    partial(_plain_forward, least=torch.float32), partial(_plain_backward, least=torch.float32)
)
"""Products of matrices in fp32 at least, on every device."""


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Run torch's flash attention of the CPU; 3.6 times the speed of plain products there."""
    if q.device.type != "cpu":
        return PLAIN_BLOCKS.forward(q, k, v, spec)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    outs, lses = [], []
    for queries, part in _chunks(spec, 1):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, queries].transpose(1, 2), keys, values, attn_mask=part.bias(q.dtype)
        )
        outs.append(out.transpose(1, 2))
        # torch gives a query that sees nothing the lse of one that sees a key of score 0
        lses.append(lse.masked_fill(part.blind, -math.inf))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _fused_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type != "cpu":
        return PLAIN_BLOCKS.backward(dout, q, k, v, out, lse, spec)
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    dqs, dks, dvs = [], [], []
    for queries, part in _chunks(spec, 1):
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[:, queries].transpose(1, 2), q[:, queries].transpose(1, 2), keys, values,
            out[:, queries].transpose(1, 2), lse[:, :, queries],
            0.0, False, attn_mask=part.bias(q.dtype),
        )  # fmt: skip
        dqs.append(dq.transpose(1, 2))
        dks.append(dk.transpose(1, 2))
        dvs.append(dv.transpose(1, 2))
    return torch.cat(dqs, dim=1), _sum(dks), _sum(dvs)


def _sum(parts: list[Tensor]) -> Tensor:
    """Add tensors of one shape in fp32 at least."""
    if len(parts) == 1:
        return parts[0]
    least = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack(parts).sum(dim=0, dtype=least)


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """One implementation and the reason, if any, why a device cannot run it."""

    function: AttentionFunction
    """The implementation."""
    block: BlockAttention
    """The same over a block of the keys."""
    available: Callable[[torch.device], str | None]
    """Reason why it cannot run on a device; None where it can."""


def _everywhere(device: torch.device) -> str | None:
    return None


ATTENTION: dict[str, AttentionBackend] = {
    "sdpa": AttentionBackend(
        sdpa_attention, BlockAttention(_fused_forward, _fused_backward), _everywhere
    ),
    "reference": AttentionBackend(
        reference_attention,
        BlockAttention(
            partial(_plain_forward, least=torch.float64),
            partial(_plain_backward, least=torch.float64),
        ),
        _everywhere,
    ),
}
"""Backends by name, the fastest first."""


def block_attention(function: AttentionFunction) -> BlockAttention:
    """Give the block form of a backend's function."""
    return next(b.block for b in ATTENTION.values() if b.function is function)


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
