"""Chunked head and loss against the plain one: values, gradients, memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.data.batch import IGNORE_INDEX
from llmtrain.ops.cross_entropy import chunked_linear_cross_entropy

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
    total, losses = chunked_linear_cross_entropy(
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
        total, _ = chunked_linear_cross_entropy(
            hidden, weight, torch.zeros(tokens, dtype=torch.int64), None, chunk
        )
        if differentiate:
            total.backward()
    assert watch.largest <= chunk * vocab


def test_all_ignored_gives_zero_loss_and_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    total, losses = chunked_linear_cross_entropy(
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
        total, losses = chunked_linear_cross_entropy(hidden, weight, targets, weights, 5)
    total.backward()
    assert total.dtype == losses.dtype == torch.float32
    assert weight.grad is not None
    assert weight.grad.dtype == weight.dtype
    expected = plain(hidden.float(), weight.float(), targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=2e-2, atol=5e-2)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), weight)
    torch.testing.assert_close(weight.grad.float(), wanted.float(), rtol=5e-2, atol=5e-2)
