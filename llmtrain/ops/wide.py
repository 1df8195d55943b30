"""Products of bf16 matrices on CPUs that make them faster in fp32: through fp32.

A CPU without instructions for them emulates a bf16 product at a quarter of the speed of an fp32
one; an Intel CPU that has avx512_bf16 but no AMX makes it at half that speed. Values of bf16 are
exact in fp32, and bf16 products add up in fp32 anyway: the result differs by the order of the sum
alone. Elsewhere ``linear`` is torch's.

Invariant: what is kept for the backward is bf16; fp32 copies live for one product.

    y = linear(x, weight, bias)     # as F.linear
"""

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _fp32_is_faster() -> bool:
    """Whether this CPU is known to multiply fp32 faster; told by its name, so always the same."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    found = torch.cpu.get_capabilities()
    is_intel = str(found.get("cpu_name", "")).startswith("Intel")
    return not (found.get("amx_bf16") or (found.get("avx512_bf16") and not is_intel))


FP32_IS_FASTER = _fp32_is_faster()
"""Whether bf16 products of this CPU are slower than fp32 ones."""


def takes_fp32(x: Tensor) -> bool:
    """Tell whether products of ``x`` are made in fp32."""
    return FP32_IS_FASTER and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map the last dim of ``x`` [..., I] by ``weight`` [O, I] and ``bias`` [O], to [..., O]."""
    if not (takes_fp32(x) and takes_fp32(weight)) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    out: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class _WideLinear(torch.autograd.Function):
    """A linear map of bf16 whose three products run in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide_bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.float(), wide_bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            (grad @ weight.float()).to(x.dtype) if of_x else None,
            (flat.T @ x.flatten(0, -2).float()).to(weight.dtype) if of_weight else None,
            flat.sum(dim=0).to(weight.dtype) if of_bias else None,
        )
