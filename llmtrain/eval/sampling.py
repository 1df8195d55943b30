"""How the next token is chosen from logits: penalty, temperature, filters, a draw.

Invariant: the steps and their order are those of transformers (repetition penalty, temperature,
top_k, top_p, min_p); a row's choice depends on its logits, its draw and its own tokens alone.

    ids = choose(logits_BV, draws_B, Sampling(max_new_tokens=64, temperature=0.8, top_p=0.95))
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    """Tokens to add at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; null means all."""
    top_p: float | None = None
    """Sample among the likeliest tokens that hold this probability; null means all."""
    min_p: float | None = None
    """Leave out tokens below this share of the likeliest one's probability; null means none."""
    repetition_penalty: float = 1.0
    """Makes tokens that stand in the text already less likely, above 1 (arXiv:1909.05858)."""
    seed: int = 0
    """Seed of the draws; each row has its own stream."""


def choose(
    logits: Tensor, draws: Tensor, sampling: Sampling, present: Tensor | None = None
) -> Tensor:
    """Pick one id per row of logits [B, V]: the likeliest, or by a draw [B] in [0, 1).

    ``present`` [B, V] is True for tokens the repetition penalty is for.
    """
    if present is not None and sampling.repetition_penalty != 1.0:
        logits = torch.where(present, _penalized(logits, sampling.repetition_penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double() / sampling.temperature
    ranked, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked, ids = ranked[:, : sampling.top_k], ids[:, : sampling.top_k]
    probabilities = ranked.softmax(dim=-1)
    mass = probabilities.cumsum(dim=-1)
    kept = torch.full_like(ids[:, :1], mass.shape[1] - 1)
    if sampling.top_p is not None:
        # The first token is always kept; each next one only while those before hold less.
        kept = (mass[:, :-1] < sampling.top_p).sum(dim=-1, keepdim=True)
    if sampling.min_p is not None:
        likely = probabilities[:, 1:] >= sampling.min_p * probabilities[:, :1]
        kept = kept.minimum(likely.sum(dim=-1, keepdim=True))
    total = mass.gather(1, kept)
    rank = torch.searchsorted(mass, draws.double()[:, None] * total, right=True)
    return ids.gather(1, rank.minimum(kept))[:, 0]


def _penalized(logits: Tensor, penalty: float) -> Tensor:
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def draw_numbers(sampling: Sampling, streams: Sequence[int]) -> Tensor:
    """Uniform numbers [B, max_new_tokens] on the CPU; each row from the stream of its number."""
    rows = []
    for stream in streams:
        key = f"{sampling.seed}/generate/{stream}".encode()
        digest = hashlib.blake2b(key, digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        rows.append(torch.rand(sampling.max_new_tokens, generator=generator))
    return torch.stack(rows)
