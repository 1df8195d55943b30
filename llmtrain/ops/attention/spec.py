"""Which keys a query sees, and the one signature of every attention backend.

Invariant: a query sees the keys of its own document at its own or an earlier position, at most
``sliding_window`` tokens back, and nothing else, whichever backend runs and wherever in the
sequence the keys came from (the whole row, a cache, another rank's part).

    spec = AttentionSpec.within(positions, document_ids, sliding_window=None)
    out, lse = select_attention("auto", torch.device("cpu"))(q, k, v, spec)
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

KeyOrder = Literal["own", "ending", "earlier", "any"]
"""Where keys stand: the queries' own tokens, a run that ends with them, all before them, unknown.

``own`` to ``earlier`` promise that document ids never fall along a row and that the positions of a
document rise by one, so that a document is a run of queries and a run of keys. With a sliding
window, ``ending`` promises that no token is left out between the keys, too.
"""


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
    softcap: float | None = None
    """Scores x become ``softcap * tanh(x / softcap)`` before the softmax (Gemma 2)."""
    causal_rows: bool = False
    """The caller vouches that every row is one document and keys are the queries' own tokens."""
    order: KeyOrder = "any"
    """What the caller vouches for; ``any`` where it knows nothing."""
    extent: tuple[int, int] | None = None
    """Most documents of a row and most tokens of a document, or more, where the host knows them."""
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def within(
        cls,
        positions: Tensor,
        document_ids: Tensor | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        extent: tuple[int, int] | None = None,
    ) -> "AttentionSpec":
        """Attention of a row to itself; no ``document_ids`` means each row is one document."""
        documents = torch.zeros_like(positions) if document_ids is None else document_ids
        return cls(
            q_positions=positions,
            q_document_ids=documents,
            kv_positions=positions,
            kv_document_ids=documents,
            sliding_window=sliding_window,
            softcap=softcap,
            causal_rows=document_ids is None and sliding_window is None,
            order="own",
            extent=(1, positions.shape[1]) if document_ids is None else extent,
        )

    def part(self, queries: slice, keys: slice, order: KeyOrder = "any") -> "AttentionSpec":
        """Give the visibility of some keys to some queries of every row, vouching for ``order``."""
        return AttentionSpec(
            q_positions=self.q_positions[:, queries],
            q_document_ids=self.q_document_ids[:, queries],
            kv_positions=self.kv_positions[:, keys],
            kv_document_ids=self.kv_document_ids[:, keys],
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            order=order,
            extent=self.extent,
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

``lse`` is the log of the softmax denominator of each query; None from a backend that hides it. No
gradient flows from it but in the reference.
"""


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """Attention to a block of the keys, as a forward and a backward that keep nothing between."""

    forward: Callable[[Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, Tensor]]
    """(q, k, v, spec) -> (out, lse) over this block alone, lse in fp32 at least.

    A query that sees nothing in the block gets out 0 and lse -inf.
    """
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, AttentionSpec],
        tuple[Tensor, Tensor, Tensor],
    ]
    """(dout, q, k, v, out, lse, spec) -> this block's share of (dq, dk, dv).

    ``out`` and ``lse`` are those over all blocks (arXiv:2205.14135, algorithm 4 of 2307.08691).
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a run asks of attention."""

    head_size: int
    """Width H of a head."""
    dtype: torch.dtype
    """Type of queries, keys and values."""
    sliding_window: bool = False
    """Whether tokens see a part of their document only."""
    softcap: bool = False
    """Whether scores are capped."""
    deterministic: bool = False
    """Whether the backward must repeat bit by bit."""
    training: bool = True
    """Whether there is a backward."""


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """One implementation and the reasons, if any, why it cannot run."""

    function: AttentionFunction
    """The implementation; it handles document masks and grouped heads, whichever backend it is."""
    block: BlockAttention
    """The same over a block of the keys."""
    available: Callable[[torch.device], str | None]
    """Reason why it cannot run on a device; None where it can."""
    supports: Callable[[Needs, torch.device], str | None]
    """Reason why it cannot give what is needed on a device that has it; None where it can."""
    prepare: Callable[[AttentionSpec, torch.dtype], object]
    """Makes what the function derives of a spec, for queries of a type; before what is compiled."""
