"""Backends against the definition; what a query may see."""

import math

import pytest
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.ops.attention import (
    ATTENTION,
    AttentionSpec,
    reference_attention,
    sdpa_attention,
    select_attention,
)

CPU = torch.device("cpu")


def rows(*lengths: int) -> tuple[Tensor, Tensor]:
    """Positions and document ids [1, S] of a row of documents."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    document_ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    return positions, document_ids


def inputs(length: int, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, length, heads, 8, dtype=torch.float64)
    k, v = torch.randn(2, 1, length, groups, 8, dtype=torch.float64)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int) -> Tensor:
    """One query at a time, over the slice of keys it may see."""
    out = torch.zeros_like(q)
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            first = max(start, i - window + 1)
            for head in range(q.shape[2]):
                group = head * k.shape[2] // q.shape[2]
                scores = k[0, first : i + 1, group] @ q[0, i, head] / math.sqrt(q.shape[-1])
                out[0, i, head] = scores.softmax(0) @ v[0, first : i + 1, group]
        start += length
    return out


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_backend_equals_the_definition(name: str, window: int | None) -> None:
    lengths = (5, 1, 7)
    q, k, v = inputs(sum(lengths))
    spec = AttentionSpec.within(*rows(*lengths), sliding_window=window)
    out, _ = ATTENTION[name].function(q, k, v, spec)
    torch.testing.assert_close(out, by_hand(q, k, v, lengths, window or 99), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ATTENTION)
def test_one_document_without_ids_equals_the_mask(name: str) -> None:
    q, k, v = inputs(9)
    positions, document_ids = rows(9)
    fast = AttentionSpec.within(positions, None)
    assert fast.causal_rows
    masked = AttentionSpec.within(positions, document_ids)
    assert not masked.causal_rows
    run = ATTENTION[name].function
    torch.testing.assert_close(run(q, k, v, fast)[0], run(q, k, v, masked)[0])


def test_window_keeps_the_mask_without_document_ids() -> None:
    positions, document_ids = rows(9)
    spec = AttentionSpec.within(positions, None, sliding_window=2)
    assert not spec.causal_rows
    assert spec.mask.equal(AttentionSpec.within(positions, document_ids, 2).mask)


def test_partial_results_join_by_lse() -> None:
    q, k, v = inputs(8)
    positions, document_ids = rows(3, 5)
    whole, lse = reference_attention(q, k, v, AttentionSpec.within(positions, document_ids))
    assert lse is not None
    parts = []
    for half in (slice(0, 4), slice(4, 8)):
        spec = AttentionSpec(
            q_positions=positions,
            q_document_ids=document_ids,
            kv_positions=positions[:, half],
            kv_document_ids=document_ids[:, half],
        )
        parts.append(reference_attention(q, k[:, half], v[:, half], spec))
    assert parts[1][1] is not None
    assert parts[1][1][0, 0, 0] == -math.inf
    assert parts[1][0][0, 0].eq(0).all()
    shares = torch.stack([part[1] for part in parts if part[1] is not None]) - lse
    joined = sum(
        part[0] * share.exp().transpose(1, 2)[..., None]
        for part, share in zip(parts, shares, strict=True)
    )
    torch.testing.assert_close(joined, whole)


def test_gradients_of_sdpa_equal_those_of_the_reference() -> None:
    leaves = [t.requires_grad_() for t in inputs(7)]
    spec = AttentionSpec.within(*rows(4, 3))
    gradients = []
    for function in (sdpa_attention, reference_attention):
        out, _ = function(*leaves, spec)
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_auto_takes_the_first_and_unknown_names_are_refused() -> None:
    assert select_attention("auto", CPU) is sdpa_attention
    assert select_attention("reference", CPU) is reference_attention
    with pytest.raises(ConfigError, match=r"engine.attention=flesh is unknown.*sdpa, reference"):
        select_attention("flesh", CPU)
