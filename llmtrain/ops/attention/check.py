"""A test of a backend's masks at the start of a run, on the device of the run.

Invariant: a run begins only where a token's output does not move when another document changes, and
where output and gradients are those of the definition, in the function and in its block form, with
a window and a cap where the model has them. It takes some milliseconds.

    check_attention("documents", torch.device("cpu"), needs, sliding_window=None, softcap=None)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.ops.attention.choose import ATTENTION
from llmtrain.ops.attention.reference import reference_attention
from llmtrain.ops.attention.spec import (
    AttentionBackend,
    AttentionFunction,
    AttentionSpec,
    BlockAttention,
    Needs,
)

_LENGTHS = ((24, 9, 31), (40, 24))
"""Documents of two rows of 64 tokens."""

_LENGTH, _HALF = 64, 32

_LARGEST_WINDOW, _LARGEST_CAP = 8, 1.0
"""Larger ones hide too little of such rows, and move scores near 1 too little, to be missed."""

_TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3,
}  # fmt: skip
"""Error over the norm that rounding explains; fp32 products in TF32 keep 1e-3, bf16 8 bits."""

_PARTS = ("output", "gradient of q", "gradient of k", "gradient of v")


def check_attention(
    name: str,
    device: torch.device,
    needs: Needs,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Try backend ``name`` on random tokens, forward and backward, as a run will use it.

    Raises:
        ConfigError: it fails, sees other documents, or does not compute attention.
    """
    window = None if sliding_window is None else min(sliding_window, _LARGEST_WINDOW)
    softcap = None if softcap is None else min(softcap, _LARGEST_CAP)
    try:
        problem = _problem(ATTENTION[name], device, needs, _spec(device, window, softcap))
    except (RuntimeError, TypeError, ValueError, AttributeError, ImportError, AssertionError) as e:
        problem = f"fails with {type(e).__name__}: {' '.join(str(e).split())}"
    if problem is not None:
        others = " or ".join(other for other in ("sdpa", "reference") if other != name)
        dtype = str(needs.dtype).removeprefix("torch.")
        raise ConfigError(
            f"attention backend {name} {problem} (start-up test, {dtype} on {device.type}); "
            f"set engine.attention={others}"
        )


_Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""(dout, q, k, v)."""


def _problem(
    backend: AttentionBackend, device: torch.device, needs: Needs, spec: AttentionSpec
) -> str | None:
    """Tell what is wrong with a backend."""
    tensors, first = _tensors(device, needs), _LENGTHS[0][0]
    dout, q, k, v = (t.clone() for t in tensors)
    for tensor in (q, k, v):
        tensor[0, :first] = 1.0
    expected = _by_autograd(reference_attention, tensors, spec)
    forms: dict[str, Callable[[_Tensors], _Tensors]] = {
        "": lambda x: _by_autograd(backend.function, x, spec),
        "in its block form ": lambda x: _by_blocks(backend.block, x, spec),
    }
    for form, run in forms.items():
        found, moved = run(tensors), run((dout, q, k, v))
        if not moved[0][0, first:].equal(found[0][0, first:]):
            return f"{form}sees other documents: a token moves when the document before it changes"
        for part, some, whole in zip(_PARTS, found, expected, strict=True):
            error = ((some.double() - whole).norm() / whole.norm()).item()
            if not error <= _TOLERANCE[needs.dtype]:
                return (
                    f"{form}gives a wrong {part}: {error:.1e} of its norm from the definition, "
                    f"rounding explains {_TOLERANCE[needs.dtype]:.0e}"
                )
    return None


def _spec(device: torch.device, window: int | None, softcap: float | None) -> AttentionSpec:
    positions = [torch.cat([torch.arange(n) for n in row]) for row in _LENGTHS]
    documents = [torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in _LENGTHS]
    extent = max(len(row) for row in _LENGTHS), max(max(row) for row in _LENGTHS)
    return AttentionSpec.within(
        torch.stack(positions).int().to(device), torch.stack(documents).int().to(device),
        window, softcap, extent,
    )  # fmt: skip


def _tensors(device: torch.device, needs: Needs) -> _Tensors:
    """Draw two key heads for four query heads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(_LENGTHS), _LENGTH, heads, needs.head_size) for heads in (4, 4, 2, 2)]
    dout, q, k, v = (
        torch.randn(shape, generator=generator).to(device, needs.dtype) for shape in shapes
    )
    return dout, q, k, v


def _by_autograd(
    function: AttentionFunction, tensors: _Tensors, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give output and gradients of a function."""
    dout, *inputs = tensors
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    with torch.enable_grad():
        out, _ = function(q, k, v, spec)
        # a scalar: given gradients, torch imports a second of code to check their shapes
        dq, dk, dv = torch.autograd.grad((out * dout).sum(), (q, k, v))
    return out.detach(), dq, dk, dv


def _by_blocks(
    block: BlockAttention, tensors: _Tensors, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give the same of a block form: halves of the keys visit halves of the queries."""
    dout, q, k, v = tensors
    halves = slice(0, _HALF), slice(_HALF, _LENGTH)
    wide = torch.promote_types(q.dtype, torch.float32)
    out, dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, q, k, v))
    for i, mine in enumerate(halves):
        pairs = [
            (keys, spec.part(mine, keys, "earlier" if j < i else "ending"))
            for j, keys in enumerate(halves[: i + 1])
        ]
        results = [block.forward(q[:, mine], k[:, keys], v[:, keys], part) for keys, part in pairs]
        lse = torch.stack([some for _, some in results]).logsumexp(dim=0)
        for some_out, some_lse in results:
            out[:, mine] += some_out * (some_lse - lse).exp().transpose(1, 2)[..., None]
        joined = out[:, mine].to(q.dtype)
        for keys, part in pairs:
            shares = block.backward(
                dout[:, mine], q[:, mine], k[:, keys], v[:, keys], joined, lse, part
            )
            dq[:, mine] += shares[0]
            dk[:, keys] += shares[1]
            dv[:, keys] += shares[2]
    return out, dq, dk, dv
