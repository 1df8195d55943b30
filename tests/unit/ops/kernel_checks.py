"""Fused kernels against their definitions in fp64, on random shapes; runs on any device.

Each check returns what it tried and what was wrong, so that it can run in a process of its own:
    cases, wrong = check("swiglu", "cpu", "triton")
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from random import Random
from threading import Barrier, Lock

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.model.init import initialize_model
from llmtrain.model.transformer import Transformer
from llmtrain.ops.cross_entropy import (
    CrossEntropyStep,
    VocabPartition,
    chunked_linear_cross_entropy,
)
from llmtrain.ops.kernels import KERNELS, TORCH_KERNELS, Kernels, select_kernels

EPS = 1e-5
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
# The interpreter cuts bf16 off where a GPU rounds; a sum or a product may round twice.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@dataclass(frozen=True)
class Draw:
    """Random shapes and values of one case."""

    random: Random
    device: str
    dtype: torch.dtype
    large: bool

    def size(self, small: int, large: int) -> int:
        return self.random.randint(1, large if self.large else small)

    def tensor(self, *shape: int) -> Tensor:
        """Values away from 0, where a norm's gradient grows without bound; dense or not."""
        seed = torch.Generator().manual_seed(self.random.getrandbits(32))
        layout = self.random.choice(("dense", "dense", "turned", "every second", "wide"))
        drawn = shape
        if layout == "turned":
            drawn = shape[::-1]
        elif layout == "every second":
            drawn = (*shape[:-1], 2 * shape[-1])
        elif layout == "wide":
            drawn = (*shape[:-1], shape[-1] + 3)
        values = torch.randn(drawn, generator=seed)
        values = (values + 0.5 * values.sign()).to(self.device, self.dtype)
        if layout == "turned":
            values = values.permute(*reversed(range(len(shape))))
        elif layout == "every second":
            values = values[..., ::2]
        return values[..., : shape[-1]]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def rotate(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, ...]:
    turned = []
    for x in (q, k):
        low, high = x.chunk(2, dim=-1)
        pairs = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)
        turned.append(torch.cat((pairs.real, pairs.imag), dim=-1))
    return tuple(turned)


Case = tuple[list[Tensor], Callable[[Kernels], Callable[..., object]], Callable[..., object]]
"""Inputs, what is tested on them, and its definition on them in fp64."""


def norm_case(draw: Draw) -> Case:
    size = draw.random.choice((1, draw.size(70, 9000), 64, 128))
    rows = [draw.random.choice((0, draw.size(9, 300))), draw.size(3, 5)]
    inputs = [draw.tensor(*rows, size), draw.tensor(size)]
    return inputs, lambda kernels: lambda x, w: kernels.rms_norm(x, w, EPS), rms_norm


def add_norm_case(draw: Draw) -> Case:
    size = draw.random.choice((1, draw.size(70, 9000), 64, 128))
    rows = [draw.random.choice((0, draw.size(9, 300))), draw.size(3, 5)]
    inputs = [draw.tensor(*rows, size), draw.tensor(*rows, size), draw.tensor(size)]
    return (
        inputs,
        lambda kernels: lambda x, r, w: kernels.add_rms_norm(x, r, w, EPS),
        lambda x, r, w: (rms_norm(x + r, w), x + r),
    )


def rotate_case(draw: Draw) -> Case:
    head = draw.random.choice((2, 64, 96, 128, 256) if draw.large else (2, 6, 16, 64, 80, 128, 256))
    keys = draw.random.randint(1, 3)
    queries = keys * draw.random.choice((1, 2, 4, 5, 8))
    rows, length = draw.random.choice((0, 1, 1, draw.size(2, 3))), draw.size(2, 200)
    inputs = [draw.tensor(rows, length, queries, head), draw.tensor(rows, length, keys, head)]
    angles = 3 * torch.rand(rows, length, 1, head // 2, dtype=torch.float64)
    angles = angles.to(draw.device)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1).float()
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).float()
    return (
        inputs,
        lambda kernels: lambda q, k: kernels.rotate(q, k, cos, sin),
        lambda q, k: rotate(q, k, angles),
    )


def swiglu_case(draw: Draw) -> Case:
    shape = (draw.random.choice((0, draw.size(9, 400))), draw.size(3, 5), draw.size(300, 5000))
    inputs = [draw.tensor(*shape), draw.tensor(*shape)]
    return inputs, lambda kernels: kernels.swiglu, lambda g, u: g / (1 + (-g).exp()) * u


CASES = {
    "rms_norm": norm_case,
    "add_rms_norm": add_norm_case,
    "rotate": rotate_case,
    "swiglu": swiglu_case,
}


def check(name: str, device: str, kernels: str, count: int = 56) -> tuple[int, list[str]]:
    """Run forward and backward on random inputs, some of which want no gradient."""
    large, tested = device != "cpu", KERNELS[kernels].load()
    wrong = []
    for seed in range(count):
        dtype = DTYPES[seed % len(DTYPES)]
        draw = Draw(Random(f"{name} {seed}"), device, dtype, large)
        inputs, call, definition = CASES[name](draw)
        frozen = draw.random.choice((None, None, None, *range(len(inputs))))
        got = run(call(tested), inputs, frozen, seed)
        doubled = [x.double() for x in inputs]
        want = run(definition, doubled, frozen, seed)
        against = {"fp64": want}
        if dtype != torch.float32:
            against["torch"] = run(call(TORCH_KERNELS), inputs, frozen, seed)
        for which, expected in against.items():
            for number, (a, b) in enumerate(zip(got, expected, strict=True)):
                bound = TOLERANCES[dtype]
                close = torch.allclose(a.double(), b.double(), rtol=bound, atol=2 * bound)
                if not close or a.dtype != dtype or a.shape != b.shape:
                    worst = (a.double() - b.double()).abs().max().item()
                    shapes = [tuple(x.shape) for x in inputs]
                    wrong.append(f"{seed} {dtype} {shapes}: {number} is {worst:.1e} off {which}")
    return count, wrong


def run(
    call: Callable[..., object], inputs: list[Tensor], frozen: int | None, seed: int
) -> list[Tensor]:
    """Give results and gradients; ``inputs[frozen]`` wants none. Gradients come in any layout."""
    leaves = [x.detach().requires_grad_(number != frozen) for number, x in enumerate(inputs)]
    out = call(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(o.shape[::-1], generator=generator).bfloat16() for o in outs]
    pairs = [
        (o, g.permute(*reversed(range(g.dim()))).to(o))
        for o, g in zip(outs, drawn, strict=True)
        if o.requires_grad
    ]
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs])
    return [o.detach() for o in outs] + list(found)


def check_cross_entropy(device: str, kernels: str, count: int = 56) -> tuple[int, list[str]]:
    """Losses, denominators and the gradient in place of the logits; whole and in two parts."""
    large, step = device != "cpu", KERNELS[kernels].load().cross_entropy_step
    wrong = []
    for seed in range(count):
        dtype = DTYPES[seed % len(DTYPES)]
        draw = Draw(Random(seed), device, dtype, large)
        rows = draw.random.choice((0, draw.size(2, 300), draw.size(2, 300)))
        size = 1 + draw.random.choice((1, draw.size(90, 40000), draw.size(9000, 130000)))
        logits = (3 * torch.randn(rows, size)).to(device, dtype)
        targets = torch.randint(size, (rows,), device=device)
        z_loss_weight = draw.random.choice((0.0, 1e-2))
        want = cross_entropy(logits.double(), targets, z_loss_weight)
        found = {"whole": step(logits.clone(), targets, None, z_loss_weight, True)}
        if seed % 2:
            found["losses"] = step(logits.clone(), targets, None, z_loss_weight, False)[:2]
        if seed % 4 == 0:
            found["parts"] = in_parts(step, logits, targets, z_loss_weight, size // 3 + 1)
        for which, got in found.items():
            for a, b, name in zip(got, want, ("loss", "lse", "gradient"), strict=False):
                bound = TOLERANCES[dtype if name == "gradient" else torch.float32]
                if not torch.allclose(a.double(), b, rtol=bound, atol=bound):
                    worst = (a.double() - b).abs().max().item()
                    wrong.append(f"{seed} {dtype} {rows} x {size}: {which} {name} {worst:.1e} off")
    return count, wrong


def cross_entropy(logits: Tensor, targets: Tensor, z: float) -> tuple[Tensor, Tensor, Tensor]:
    logits.requires_grad_()
    lse = logits.logsumexp(dim=-1)
    loss = lse - logits.gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad((loss + z * lse.square()).sum(), logits)
    return loss.detach(), lse.detach(), gradient


class Exchange:
    """What two holders of a vocabulary tell each other; one runs while the other waits for it."""

    def __init__(self) -> None:
        self.turn = Lock()
        self.both = Barrier(2, timeout=60)
        self.values: dict[int, Tensor] = {}

    def combine(self, holder: int, how: Callable[..., Tensor], mine: Tensor) -> Tensor:
        self.values[holder] = mine.clone()
        self.turn.release()
        self.both.wait()
        combined = how(*self.values.values())
        self.both.wait()
        self.turn.acquire()
        return combined


def in_parts(
    step: CrossEntropyStep, logits: Tensor, targets: Tensor, z: float, cut: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the step on two parts of the vocabulary."""
    exchange = Exchange()

    def run(holder: int, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        combine = partial(exchange.combine, holder)
        highest, total = partial(combine, torch.maximum), partial(combine, torch.add)
        partition = VocabPartition(start=holder * cut, sum=total, max=highest)
        with exchange.turn:
            return step(part.clone(), targets, partition, z, True)

    with ThreadPoolExecutor(2) as pool:
        (loss, lse, first), (_, _, second) = pool.map(run, (0, 1), logits.tensor_split([cut], 1))
    return loss, lse, torch.cat((first, second), dim=1)


MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_norm=True,
)


def check_model(device: str, kernels: str) -> dict[str, float]:
    """Loss and gradients of a whole model against those of the plain kernels, relative errors."""
    figures = [figures_of(KERNELS[name].load(), device) for name in (kernels, "torch")]
    return {
        name: ((figures[0][name] - want).norm() / want.norm()).item()
        for name, want in figures[1].items()
    }


def figures_of(kernels: Kernels, device: str) -> dict[str, Tensor]:
    model = Transformer(MODEL, kernels=kernels)
    initialize_model(model, MODEL, seed=3)
    model.to(device)
    tokens = torch.arange(6, device=device).reshape(2, 3)
    positions = torch.arange(3, dtype=torch.int32, device=device).repeat(2, 1) % 2
    documents = (torch.arange(3, device=device) // 2).repeat(2, 1)
    hidden = model(tokens, positions, documents)
    loss, _, _ = chunked_linear_cross_entropy(
        hidden.flatten(0, 1), model.head.weight, (3 * tokens.flatten() + 1) % 61, None, 5,
        z_loss_weight=1e-2, step=kernels.cross_entropy_step,
    )  # fmt: skip
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def imported_by_plain_kernels() -> list[str]:
    """List what of Triton is loaded after the plain kernels were chosen; call it first."""
    select_kernels("torch", torch.device("cpu"))
    return [name for name in sys.modules if name == "triton" or "ops.triton" in name]


def interpreted() -> str | None:
    """Tell why this process cannot run the kernels on a CPU."""
    return KERNELS["triton"].available(torch.device("cpu"))
