"""bf16 products through fp32: the values of F.linear, its gradients, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.model.layers import Linear
from llmtrain.ops import cross_entropy, wide
from llmtrain.ops.cross_entropy import chunked_linear_cross_entropy


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "FP32_IS_FASTER", True)


def operands(bias: bool) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 7, 12), (5, 12), (5,)][: 3 if bias else 2]
    return [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]


@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_fp64_product_rounded_once(bias: bool) -> None:
    found, exact = operands(bias), [x.detach().double().requires_grad_() for x in operands(bias)]
    grad = torch.randn(2, 7, 5).bfloat16()
    outputs = []
    for linear, inputs, of_output in (
        (wide.linear, found, grad), (F.linear, exact, grad.double()),
    ):  # fmt: skip
        out = linear(*inputs, *(() if bias else (None,)))
        outputs.append(out)
        out.backward(of_output)
    assert outputs[0].dtype == torch.bfloat16
    pairs = [tuple(outputs), *((a.grad, b.grad) for a, b in zip(found, exact, strict=True))]
    for ours, wanted in pairs:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), wanted, rtol=2**-8, atol=1e-6)


def test_keeps_bf16_for_the_backward() -> None:
    layer = Linear(12, 5, bias=False).bfloat16()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(torch.randn(3, 12).bfloat16())
    assert {x.dtype for x in kept} == {torch.bfloat16}


def test_gives_the_gradient_that_is_asked_for() -> None:
    x, weight = operands(bias=False)
    out = wide.linear(x, weight, None).float().sum()
    (of_x,) = torch.autograd.grad(out, x, retain_graph=True)
    (of_weight,) = torch.autograd.grad(out, weight)
    assert of_x.shape == x.shape
    assert of_weight.shape == weight.shape


def test_other_types_and_autocast_are_left_to_torch() -> None:
    x, weight = (t.detach() for t in operands(bias=False))
    assert wide.linear(x.float(), weight.float(), None).dtype == torch.float32
    assert not wide.takes_fp32(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert wide.linear(x.float(), weight, None).dtype == torch.bfloat16


def test_head_and_loss_are_no_less_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head's matrix is taken some rows at a time, the last part smaller."""
    monkeypatch.setattr(cross_entropy, "_PRODUCT_ROWS", 16)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    targets = torch.randint(0, 40, (9,))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    found = [x.requires_grad_() for x in (hidden, weight)]
    total, losses, _ = chunked_linear_cross_entropy(*found, targets, chunk_tokens=4)
    wanted = F.cross_entropy(F.linear(*exact), targets, reduction="none")
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    total.backward()
    wanted.sum().backward()
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2**-8, atol=1e-5)


def test_products_of_bf16_are_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bf16 as it is adds the head's gradient up some rows at a time."""
    monkeypatch.setattr(wide, "FP32_IS_FASTER", False)
    monkeypatch.setattr(cross_entropy, "_PRODUCT_ROWS", 16)
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    targets = torch.randint(0, 40, (9,))
    exact = weight.double().requires_grad_()
    weight.requires_grad_()
    total, _, _ = chunked_linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    total.backward()
    F.cross_entropy(F.linear(hidden.double(), exact), targets, reduction="sum").backward()
    assert weight.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=0, atol=0.05)
