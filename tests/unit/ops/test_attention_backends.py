"""Every backend against the definition in fp64, forward and backward, on random shapes."""

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from llmtrain.ops import wide
from llmtrain.ops.attention.choose import ATTENTION, why_not
from llmtrain.ops.attention.plain import REFERENCE_BLOCKS
from llmtrain.ops.attention.reference import reference_attention
from llmtrain.ops.attention.spec import AttentionSpec, Needs

NUM_SHAPES = 56
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Error over the norm; bf16 keeps 8 bits."""


@dataclass(frozen=True)
class Shape:
    """Rows of documents, heads, and what sees what."""

    rows: tuple[tuple[int, ...], ...]
    heads: int
    groups: int
    head_size: int
    window: int | None
    softcap: float | None
    dtype: torch.dtype

    @staticmethod
    def random(seed: int) -> "Shape":
        """Rows are whole documents, tiny ones, short ones or of any length."""
        draw = random.Random(seed)
        length = draw.randint(3, 150)
        groups = draw.choice((1, 2, 3))
        longest = draw.choice((None, 2, 5, length // 2 + 1, length))
        return Shape(
            rows=tuple(_documents(draw, length, longest) for _ in range(draw.randint(1, 3))),
            heads=groups * draw.choice((1, 2, 4)),
            groups=groups,
            head_size=draw.choice((64, 80, 96, 128, 256)),
            window=draw.choice((None, None, 1, 7, 64)),
            softcap=draw.choice((None, None, None, 2.0, 30.0)),
            dtype=draw.choice((torch.float64, torch.float32, torch.bfloat16)),
        )

    def spec(self, device: torch.device) -> AttentionSpec:
        positions = [torch.cat([torch.arange(n) for n in row]) for row in self.rows]
        ids = [torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in self.rows]
        return AttentionSpec.within(
            torch.stack(positions).int().to(device), torch.stack(ids).int().to(device),
            self.window, self.softcap,
        )  # fmt: skip

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """dout, q, k, v; scores are large enough for a cap to matter."""
        generator = torch.Generator().manual_seed(0)
        shape = len(self.rows), sum(self.rows[0])
        return tuple(
            torch.randn(*shape, heads, self.head_size, generator=generator).to(device, dtype)
            for heads in (self.heads, self.heads, self.groups, self.groups)
        )


def _documents(draw: random.Random, length: int, longest: int | None) -> tuple[int, ...]:
    if longest is None:
        return (length,)
    lengths = []
    while length:
        lengths.append(draw.randint(1, min(longest, length)))
        length -= lengths[-1]
    return tuple(lengths)


def error(found: Tensor, expected: Tensor, dout: Tensor) -> float:
    """Error over the norm; gradients are sums of terms as large as ``dout``, and may be 0."""
    scale = max(expected.double().norm(), dout.double().norm())
    return ((found.double() - expected.double()).norm() / scale).item()


def check(name: str, device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """Hold a backend against the definition."""
    spec = shape.spec(device)
    dout, *inputs = shape.tensors(device, dtype)
    results = []
    for run in (ATTENTION[name].function, reference_attention):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out, lse = run(*leaves, spec)
        results.append((out, *torch.autograd.grad((out * dout).sum(), leaves), lse))
    for found, expected in zip(*results, strict=True):
        if found is not None:
            assert error(found, expected, dout) < TOLERANCE[dtype], shape


def check_blocks(name: str, device: torch.device, shape: Shape, dtype: torch.dtype) -> None:
    """Hold the block form against the definition: the last half of the queries, their own keys
    and those before them, for rows that can be cut so."""
    spec = shape.spec(device)
    dout, q, k, v = shape.tensors(device, dtype)
    half, length = sum(shape.rows[0]) // 2, sum(shape.rows[0])
    block = ATTENTION[name].block
    for keys, order in ((slice(0, half), "earlier"), (slice(0, length), "ending")):
        part = spec.part(slice(half, length), keys, order)
        arguments = q[:, half:], k[:, keys], v[:, keys]
        out, lse = block.forward(*arguments, part)
        wanted, wanted_lse = REFERENCE_BLOCKS.forward(*arguments, part)
        blind = wanted_lse == -torch.inf
        assert lse[blind].eq(-torch.inf).all()
        assert error(out, wanted, dout) < TOLERANCE[dtype], shape
        assert error(lse[~blind], wanted_lse[~blind], dout) < TOLERANCE[dtype], shape
        arguments = dout[:, half:], *arguments, wanted.to(dtype)
        shares = block.backward(*arguments, wanted_lse.to(lse.dtype), part)
        expected = REFERENCE_BLOCKS.backward(*arguments, wanted_lse, part)
        for found, gradient in zip(shares, expected, strict=True):
            assert error(found, gradient, dout) < TOLERANCE[dtype], shape


SHAPES = [Shape.random(seed) for seed in range(NUM_SHAPES)]


@pytest.fixture(params=[True, False], ids=["without bf16", "with bf16"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a CPU with and without products of bf16, whatever this one has."""
    monkeypatch.setattr(wide, "FP32_IS_FASTER", request.param)


@pytest.mark.usefixtures("instructions")
def test_bf16_equals_the_definition_with_and_without_its_instructions() -> None:
    for shape in SHAPES[::4]:
        check("documents", torch.device("cpu"), shape, torch.bfloat16)
        check_blocks("documents", torch.device("cpu"), shape, torch.bfloat16)


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", ["documents", "sdpa"])
def test_backend_equals_the_definition_on_random_shapes(name: str, part: int) -> None:
    for shape in SHAPES[part :: 8 if name == "documents" else 16]:
        check(name, torch.device("cpu"), shape, shape.dtype)


@pytest.mark.parametrize("part", range(4))
def test_blocks_equal_the_definition_on_random_shapes(part: int) -> None:
    for shape in SHAPES[part::8]:
        check_blocks("documents", torch.device("cpu"), shape, shape.dtype)


def test_shapes_differ_in_all_that_matters() -> None:
    assert {shape.head_size for shape in SHAPES} == {64, 80, 96, 128, 256}
    assert {shape.heads // shape.groups for shape in SHAPES} == {1, 2, 4}
    assert max(len(row) for shape in SHAPES for row in shape.rows) > 60
    assert sum(shape.window is not None for shape in SHAPES) > 15
    assert sum(shape.softcap is not None for shape in SHAPES) > 15
    assert sum(len(row) == 1 for shape in SHAPES for row in shape.rows) > 3


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_the_definition_forward() -> None:
    """It has no backward on a CPU."""
    for shape in SHAPES[:3]:
        dout, q, k, v = shape.tensors(torch.device("cpu"), torch.float32)
        spec = shape.spec(torch.device("cpu"))
        expected, _ = reference_attention(q, k, v, spec)
        assert error(ATTENTION["flex"].function(q, k, v, spec)[0], expected, dout) < 2e-6, shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", [name for name in ATTENTION if name != "documents"])
def test_backend_of_a_gpu_equals_the_definition(name: str, part: int) -> None:
    device = torch.device("cuda")
    dtype = torch.float32 if name == "reference" else torch.bfloat16
    for shape in SHAPES[part::8]:
        needs = Needs(
            head_size=shape.head_size, dtype=dtype, softcap=shape.softcap is not None,
            sliding_window=shape.window is not None,
        )  # fmt: skip
        if (reason := why_not(name, device)) is not None:
            pytest.skip(reason)
        if why_not(name, device, needs) is None:
            check(name, device, shape, dtype)
            check_blocks(name, device, shape, dtype)
