"""Short documents side by side in bins of one size, so that one call of a kernel does them all.

Invariant: every token of a short document has one slot, documents keep apart by the mask of the
bins, and what fills a bin up sees and is seen by nothing but itself.

    bins = bins_of(starts, window=0, softcap=0.0)
    made = attend(bins.filled(q), bins.filled(k), bins.filled(v), bins.spec)
    out[bins.tokens] = bins.taken(made)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from llmtrain.ops.attention.spec import AttentionSpec

BIN_TOKENS = 64
"""Slots of a bin; a document of as many tokens or fewer is short.

A call of its own would cost more than what it computes, larger bins more than the calls they save.
"""


@dataclass(frozen=True, slots=True)
class Bins:
    """Where the tokens of short documents go; C bins of L slots."""

    tokens: Tensor
    """Tokens of short documents, int64 [U]."""
    slots: Tensor
    """Their slots in the bins, int64 [U]."""
    sources: Tensor
    """The token of every slot, int64 [C L]; the first of a short document where none is."""
    spec: AttentionSpec
    """Who sees whom in the bins, rows of L."""

    def filled(self, x: Tensor) -> Tensor:
        """Take [T, ...] to [C, L, ...]."""
        return torch.unflatten(x.index_select(0, self.sources), 0, self.spec.q_positions.shape)

    def taken(self, x: Tensor) -> Tensor:
        """Take [C, L, ...] to what belongs to ``tokens``, [U, ...]."""
        return x.flatten(0, 1).index_select(0, self.slots)


@lru_cache(maxsize=2)
def bins_of(starts: tuple[int, ...], window: int, softcap: float) -> Bins | None:
    """Put the short ones of the documents that begin at ``starts`` into bins; None below two.

    All layers of a forward and a backward ask for the same bins.
    """
    begins = torch.tensor(starts)
    lengths = begins.diff()
    short = (lengths > 0) & (lengths <= BIN_TOKENS)
    begins, lengths = begins[:-1][short], lengths[short]
    if len(lengths) < 2:
        return None
    places = torch.tensor(_places(lengths.tolist()))
    document = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(len(document)) - (lengths.cumsum(0) - lengths)[document]
    tokens, slots = begins[document] + position, places[document] + position
    bins = int(places[-1]) // BIN_TOKENS + 1
    owners = torch.full((bins * BIN_TOKENS,), -1).index_copy_(0, slots, document)
    spec = AttentionSpec.within(
        torch.arange(BIN_TOKENS).expand(bins, -1), owners.view(bins, -1),
        window or None, softcap or None,
    )  # fmt: skip
    sources = begins[0].repeat(len(owners)).index_copy_(0, slots, tokens)
    return Bins(tokens, slots, sources, spec)


def _places(lengths: list[int]) -> list[int]:
    """Give the slot where each document begins; one that does not fit begins the next bin."""
    places, used = [], 0
    for length in lengths:
        if used % BIN_TOKENS + length > BIN_TOKENS:
            used += -used % BIN_TOKENS
        places.append(used)
        used += length
    return places
