"""Backends against the definition; what a query may see."""

import math

import pytest
import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.ops.attention import plain
from llmtrain.ops.attention.choose import ATTENTION, block_attention, select_attention, why_not
from llmtrain.ops.attention.plain import PLAIN_BLOCKS
from llmtrain.ops.attention.reference import reference_attention
from llmtrain.ops.attention.sdpa import sdpa_attention
from llmtrain.ops.attention.spec import AttentionSpec

CPU = torch.device("cpu")
HERE = [name for name in ATTENTION if why_not(name, CPU) is None]
"""Backends that run on any machine."""


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


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("window", [None, 1, 3])
def test_backend_equals_the_definition(name: str, window: int | None) -> None:
    lengths = (5, 1, 7)
    q, k, v = inputs(sum(lengths))
    spec = AttentionSpec.within(*rows(*lengths), sliding_window=window)
    out, _ = ATTENTION[name].function(q, k, v, spec)
    torch.testing.assert_close(out, by_hand(q, k, v, lengths, window or 99), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", HERE)
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


BLOCKS = {"plain": PLAIN_BLOCKS, **{name: ATTENTION[name].block for name in HERE}}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_keys_add_up_to_the_whole(
    name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(plain, "_MAX_SCORES", 60)
    block = BLOCKS[name]
    leaves = [t.requires_grad_() for t in inputs(14)]
    q, k, v = (t.detach() for t in leaves)
    spec = AttentionSpec.within(*rows(5, 9), sliding_window=4)
    out, lse = reference_attention(*leaves, spec)
    assert lse is not None
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves, dout)
    found = [torch.zeros_like(t) for t in (q, k, v, out)]
    for keys in (slice(0, 3), slice(3, 11), slice(11, 14)):
        part = spec.part(slice(0, 14), keys)
        some_out, some_lse = block.forward(q, k[:, keys], v[:, keys], part)
        blind = ~part.mask.any(-1).expand_as(some_lse)
        assert blind.any()
        assert some_lse[blind].eq(-math.inf).all()
        assert some_out[blind.transpose(1, 2)].eq(0).all()
        found[3] += some_out * (some_lse - lse).exp().transpose(1, 2)[..., None]
        shares = block.backward(dout, q, k[:, keys], v[:, keys], out.detach(), lse.detach(), part)
        found[0] += shares[0]
        found[1][:, keys] += shares[1]
        found[2][:, keys] += shares[2]
    for value, expected in zip(found, (*wanted, out), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_query_that_sees_no_key_at_all_has_no_gradient(name: str) -> None:
    q, k, v = inputs(4)
    nothing = AttentionSpec(
        q_positions=torch.zeros(1, 4), q_document_ids=torch.zeros(1, 4),
        kv_positions=torch.zeros(1, 4), kv_document_ids=torch.tensor([[0, 0, 1, 1]]),
    )  # fmt: skip
    nothing = nothing.part(slice(0, 4), slice(2, 4))
    out, lse = BLOCKS[name].forward(q, k[:, 2:], v[:, 2:], nothing)
    shares = BLOCKS[name].backward(torch.ones_like(q), q, k[:, 2:], v[:, 2:], out, lse, nothing)
    assert all(share.eq(0).all() for share in shares)


def test_blocks_in_bf16_keep_the_lse_in_fp32() -> None:
    """Where a CPU multiplies bf16, torch takes exp to about 6e-5; bf16 itself has 4e-3."""
    q, k, v = (t.bfloat16() for t in inputs(7))
    spec = AttentionSpec.within(*rows(4, 3))
    _, expected = reference_attention(q, k, v, spec)
    for block in BLOCKS.values():
        _, lse = block.forward(q, k, v, spec)
        assert lse.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(lse.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_backend_knows_its_blocks() -> None:
    assert block_attention(reference_attention) is ATTENTION["reference"].block


def test_what_is_derived_of_a_spec_is_made_once() -> None:
    spec = AttentionSpec.within(*rows(4, 3))
    assert spec.derived("answer", list) is spec.derived("answer", list)
    assert spec.bias(torch.float32) is spec.bias(torch.float32)


def test_auto_takes_the_fastest_and_unknown_names_are_refused() -> None:
    assert select_attention("auto", CPU) is ATTENTION["documents"].function
    assert select_attention("reference", CPU) is reference_attention
    with pytest.raises(ConfigError, match=r"engine.attention=flesh is unknown.*sdpa, reference"):
        select_attention("flesh", CPU)
