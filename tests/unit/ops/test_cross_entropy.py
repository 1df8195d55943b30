"""Chunked head and loss against the plain one: values, gradients, memory, parts, z-loss."""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.data.batch import IGNORE_INDEX
from llmtrain.ops import cross_entropy
from llmtrain.ops.cross_entropy import VocabPartition, chunked_linear_cross_entropy

T, D, V = 23, 6, 17


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (T,))
    targets[[0, 5, T - 1]] = IGNORE_INDEX
    weights = torch.rand(T) + 0.5
    weights[3] = 0.0
    return hidden, weight, targets, weights


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")


@pytest.mark.parametrize("chunk_tokens", [1, 7, T, 1000])
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_plain_cross_entropy(chunk_tokens: int, weighted: bool) -> None:
    hidden, weight, targets, weights = inputs()
    expected = plain(hidden, weight, targets)
    scale = weights.double() if weighted else torch.ones(T, dtype=torch.float64)
    total, losses, _ = chunked_linear_cross_entropy(
        hidden, weight, targets, weights if weighted else None, chunk_tokens
    )
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, (expected * scale).sum())
    assert not losses.requires_grad
    found = torch.autograd.grad(total * 3, (hidden, weight))
    wanted = torch.autograd.grad((expected * scale).sum() * 3, (hidden, weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, IGNORE_INDEX, 2, 2, 1, 3])
    weights = torch.rand(7)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_linear_cross_entropy(hidden, weight, targets, weights, 3)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradient_of_one_input_alone(frozen: str) -> None:
    hidden, weight, targets, weights = inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    chunked_linear_cross_entropy(hidden, weight, targets, weights, 4)[0].backward()
    found = weight.grad if frozen == "hidden" else hidden.grad
    kept = weight if frozen == "hidden" else hidden
    (expected,) = torch.autograd.grad((plain(hidden, weight, targets) * weights).sum(), kept)
    torch.testing.assert_close(found, expected)


def test_weight_used_twice_gets_both_gradients() -> None:
    _, weight, targets, _ = inputs()
    tokens = torch.randint(0, V, (T,))

    def gradient(chunked: bool) -> Tensor:
        hidden = F.embedding(tokens, weight).tanh()
        if chunked:
            total = chunked_linear_cross_entropy(hidden, weight, targets, None, 8)[0]
        else:
            total = plain(hidden, weight, targets).sum()
        (found,) = torch.autograd.grad(total, weight)
        return found

    torch.testing.assert_close(gradient(True), gradient(False))


class LargestTensor(TorchDispatchMode):
    """Watches the number of elements of every result."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("differentiate", [True, False])
def test_no_intermediate_exceeds_a_chunk_of_logits(differentiate: bool) -> None:
    tokens, width, vocab, chunk = 256, 8, 512, 32
    hidden = torch.randn(tokens, width, requires_grad=differentiate)
    weight = torch.randn(vocab, width, requires_grad=differentiate)
    with LargestTensor() as watch:
        total, _, _ = chunked_linear_cross_entropy(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64), None, chunk
        )
        if differentiate:
            total.backward()
    assert watch.largest <= chunk * vocab


def test_all_ignored_gives_zero_loss_and_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    total, losses, _ = chunked_linear_cross_entropy(
        hidden, weight, torch.full_like(targets, IGNORE_INDEX), None, 4
    )
    total.backward()
    assert total.item() == 0
    assert losses.eq(0).all()
    assert hidden.grad is not None
    assert hidden.grad.eq(0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_keeps_sums_in_fp32(autocast: bool) -> None:
    hidden, weight, targets, weights = inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, losses, _ = chunked_linear_cross_entropy(hidden, weight, targets, weights, 5)
    total.backward()
    assert total.dtype == losses.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == weight.dtype
    expected = plain(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=2e-2, atol=5e-2)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), weight)
    torch.testing.assert_close(weight.grad.float(), wanted.float(), rtol=5e-2, atol=5e-2)


Z_WEIGHT = 0.3


def plain_with_z(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, z_weight: float
) -> Tensor:
    lse = F.linear(hidden, weight).logsumexp(dim=-1)
    losses = plain(hidden, weight, targets) + z_weight * lse.square() * (targets >= 0)
    return (losses * scale).sum()


def test_z_loss_adds_the_weighted_square_of_the_log_denominator() -> None:
    hidden, weight, targets, weights = inputs()
    total, losses, lse = chunked_linear_cross_entropy(
        hidden, weight, targets, weights, 7, z_loss_weight=Z_WEIGHT
    )
    wanted = plain_with_z(hidden, weight, targets, weights.double(), Z_WEIGHT)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(losses, plain(hidden, weight, targets))
    denominators = F.linear(hidden, weight).logsumexp(dim=-1) * (targets >= 0)
    torch.testing.assert_close(lse, denominators.detach())
    found = torch.autograd.grad(total, (hidden, weight))
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (hidden, weight)))


class Parts:
    """Sums and maxima over the parts of a vocabulary, each of which runs in a thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slots: list[Tensor] = [torch.empty(0)] * count
        self.barrier = Barrier(count, timeout=20)

    def combined(self, part: int, value: Tensor, how: str) -> Tensor:
        self.slots[part] = value
        self.barrier.wait()
        stacked = torch.stack(self.slots)
        self.barrier.wait()
        return stacked.sum(dim=0) if how == "sum" else stacked.amax(dim=0)

    def partition(self, part: int, start: int) -> VocabPartition:
        return VocabPartition(
            start=start,
            sum=lambda value: self.combined(part, value, "sum"),
            max=lambda value: self.combined(part, value, "max"),
        )


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    tokens=st.integers(1, 12),
    chunk=st.integers(1, 13),
    z_weight=st.sampled_from([0.0, Z_WEIGHT]),
    seed=st.integers(0, 99),
)
def test_uneven_parts_of_the_vocabulary_give_the_whole(
    sizes: list[int], tokens: int, chunk: int, z_weight: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
    weight = 5 * torch.randn(sum(sizes), 3, dtype=torch.float64, generator=generator)
    targets = torch.randint(-1, sum(sizes), (tokens,), generator=generator)
    targets[targets < 0] = IGNORE_INDEX
    scale = torch.rand(tokens, dtype=torch.float64, generator=generator)
    edges = list(pairwise(accumulate(sizes, initial=0)))
    parts = Parts(len(sizes))

    def run(part: int) -> list[Tensor]:
        start, stop = edges[part]
        inputs = [hidden.clone().requires_grad_(), weight[start:stop].clone().requires_grad_()]
        total, losses, lse = chunked_linear_cross_entropy(
            *inputs, targets, scale, chunk, parts.partition(part, start), z_weight
        )
        return [total.detach(), losses, lse, *torch.autograd.grad(total, inputs)]

    with ThreadPoolExecutor(len(sizes)) as pool:
        totals, losses, lses, by_hidden, by_weight = zip(
            *pool.map(run, range(len(sizes))), strict=True
        )
    hidden.requires_grad_()
    weight.requires_grad_()
    wanted = plain_with_z(hidden, weight, targets, scale, z_weight)
    grad_hidden, grad_weight = torch.autograd.grad(wanted, (hidden, weight))
    torch.testing.assert_close(totals[0], wanted.detach())
    torch.testing.assert_close(losses[0], plain(hidden, weight, targets).detach())
    torch.testing.assert_close(torch.stack(by_hidden).sum(dim=0), grad_hidden)
    torch.testing.assert_close(torch.cat(by_weight), grad_weight)
    for each in (totals, losses, lses):
        assert all(torch.equal(each[0], other) for other in each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_stay_in_the_cache_give_what_all_rows_give(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(23, 17).to(dtype), torch.randint(0, 17, (23,))
    whole = cross_entropy.torch_step(logits.clone(), targets, None, Z_WEIGHT, True)
    monkeypatch.setattr(cross_entropy, "_CACHED_LOGITS", 5 * 17)
    pieces = cross_entropy.torch_step(logits.clone(), targets, None, Z_WEIGHT, True)
    for ours, wanted in zip(pieces, whole, strict=True):
        assert torch.equal(ours, wanted)


def test_a_large_vocabulary_takes_fewer_tokens_at_a_time() -> None:
    tokens, vocab = 600, 1 << 17
    hidden, weight = torch.randn(tokens, 1), torch.randn(vocab, 1)
    with LargestTensor() as watch:
        chunked_linear_cross_entropy(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64), None, chunk_tokens=1024
        )
    assert watch.largest <= 256 * vocab


def test_a_graph_that_is_kept_gives_its_gradients_twice() -> None:
    hidden, weight, targets, _ = inputs()
    total = chunked_linear_cross_entropy(hidden, weight, targets, None, 8)[0] * 3
    first = torch.autograd.grad(total, weight, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, weight), first, rtol=0, atol=0)
