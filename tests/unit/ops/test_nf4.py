"""Packed matrices: bitsandbytes' values, exact when packed again, products and their gradients."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import bitsandbytes.functional
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.model.transformer import Transformer
from llmtrain.ops.nf4 import BLOCK, PackedMatrix
from llmtrain.parallel.packed import pack_blocks
from tests.distributed.adapters import adapted
from tests.distributed.layouts import native

CPU = torch.device("cpu")
SHAPES = [(64, 128), (20, 32), (7, 192), (33, 5)]


def packed(weight: Tensor) -> PackedMatrix:
    matrix = PackedMatrix(tuple(weight.shape), CPU)
    matrix.store(weight)
    return matrix


def reference(weight: Tensor) -> Tensor:
    """The nearest of 16 values (arXiv:2305.14314, appendix E) times the largest of a block."""
    table = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ])  # fmt: skip
    flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.abs().amax(dim=1, keepdim=True)
    nearest = (flat / largest)[..., None].sub(table).abs().argmin(dim=-1)
    return (table[nearest] * largest).flatten()[: weight.numel()].view_as(weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_the_paper_and_packed_again_the_same(shape: Sequence[int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02
    matrix = packed(weight)
    assert torch.allclose(matrix.values(), reference(weight), rtol=1e-6, atol=0)
    again = packed(matrix.values())
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.factors, matrix.factors)
    assert torch.equal(matrix.values(torch.bfloat16), matrix.values().bfloat16())
    assert matrix.nbytes == -(-weight.numel() // 2) + 4 * -(-weight.numel() // BLOCK)


def test_whole_rows_are_what_bitsandbytes_packs() -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1))
    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    matrix = packed(weight)
    assert torch.equal(matrix.codes, codes)
    assert torch.equal(matrix.factors, state.absmax)
    assert torch.equal(matrix.values(), bitsandbytes.functional.dequantize_4bit(codes, state))


def test_nothing_stored_is_zero() -> None:
    assert torch.equal(PackedMatrix((3, 50), CPU).values(), torch.zeros(3, 50))


def test_products_and_gradients() -> None:
    weight, bias = torch.randn(20, 32), torch.randn(20)
    matrix = packed(weight)
    x = torch.randn(2, 5, 32, requires_grad=True)
    found = matrix.multiply(x, weight, bias)
    found.square().sum().backward()
    mine, x.grad = x.grad, None
    expected = F.linear(x, matrix.values(), bias)
    expected.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.allclose(mine, x.grad, rtol=1e-5)


def test_without_bitsandbytes_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = adapted(native("x")).model
    assert model.adapter is not None
    adapter = replace(model.adapter, quantize_base="nf4")
    with torch.device("meta"):
        transformer = Transformer(replace(model, adapter=adapter))
    with pytest.raises(ConfigError, match="pip install 'llmtrain\\[qlora\\]'; or use null"):
        pack_blocks(transformer, adapter, CPU)
