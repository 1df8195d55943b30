"""The fused operations of a block and of the loss, and which implementation a device runs.

Invariant: every implementation computes the same functions with the same rounding points: fp32 (or
fp64) inside, one rounding of each result. Which one runs is chosen once, by what the device can do,
and logged; a model takes it as an argument, as it takes attention.

    kernels = select_kernels("auto", torch.device("cuda"))
    model = Transformer(config, kernels=kernels)
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.errors import ConfigError
from llmtrain.ops import norm, rope, swiglu
from llmtrain.ops.cross_entropy import CrossEntropyStep, torch_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One implementation of the operations between matrix products; all differentiable but one."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    """(x [..., D], weight [D], eps) -> normalised and scaled, [..., D]."""
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x [..., D], residual [..., D], weight [D], eps) -> (normalised sum, sum)."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """(q [B, S, N, H], k [B, S, G, H], cos, sin [B, S, 1, H] as in ``Rotation``) -> (q, k)."""
    swiglu: Callable[[Tensor, Tensor], Tensor]
    """(gate [..., F], up [..., F]) -> silu(gate) * up."""
    cross_entropy_step: CrossEntropyStep
    """Logits of a chunk to losses and gradient, in the forward."""


TORCH_KERNELS = Kernels(
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    rotate=rope.rotate,
    swiglu=swiglu.swiglu,
    cross_entropy_step=torch_step,
)
"""Plain PyTorch, on every device and in every precision."""


@dataclass(frozen=True, slots=True)
class KernelBackend:
    """An implementation that is imported when it is chosen."""

    load: Callable[[], Kernels]
    """Imports it; call it only where it is available."""
    available: Callable[[torch.device], str | None]
    """Reason why it cannot run on a device; None where it can."""


def _load_triton() -> Kernels:
    from llmtrain.ops.triton import cross_entropy
    from llmtrain.ops.triton import norm as triton_norm
    from llmtrain.ops.triton import rope as triton_rope
    from llmtrain.ops.triton import swiglu as triton_swiglu

    return Kernels(
        rms_norm=triton_norm.rms_norm,
        add_rms_norm=triton_norm.add_rms_norm,
        rotate=triton_rope.rotate,
        swiglu=triton_swiglu.swiglu,
        cross_entropy_step=cross_entropy.triton_step,
    )


def _triton_available(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"needs compute capability 8.0, found {major}.{minor}"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    return f"needs an NVIDIA GPU, found {device.type} (TRITON_INTERPRET=1 interprets it, slowly)"


KERNELS: dict[str, KernelBackend] = {
    "triton": KernelBackend(_load_triton, _triton_available),
    "torch": KernelBackend(lambda: TORCH_KERNELS, lambda device: None),
}
"""Implementations by name, the fastest first."""


def select_kernels(name: str, device: torch.device) -> Kernels:
    """Choose the kernels ``name``, or for ``auto`` the fastest ``device`` can run; log it.

    Raises:
        ConfigError: ``name`` is unknown, or its kernels cannot run on ``device``.
    """
    chosen, passed_over = _choice(name, device)
    why = "as configured" if name != "auto" else "; ".join(passed_over) or "the fastest"
    logger.info("kernels: %s on %s (%s)", chosen, device.type, why)
    return KERNELS[chosen].load()


def choose_kernels(name: str, device: torch.device) -> Kernels:
    """Give what ``select_kernels`` does, without a line in the log."""
    return KERNELS[_choice(name, device)[0]].load()


def _choice(name: str, device: torch.device) -> tuple[str, list[str]]:
    """Give the name of the kernels to take, and the reason for each that is passed over."""
    if name != "auto" and name not in KERNELS:
        names = ", ".join(KERNELS)
        raise ConfigError(f"engine.kernels={name} is unknown; use one of auto, {names}")
    passed_over: list[str] = []
    for candidate in KERNELS if name == "auto" else (name,):
        reason = KERNELS[candidate].available(device)
        if reason is None:
            return candidate, passed_over
        passed_over.append(f"{candidate}: {reason}")
    raise ConfigError(
        f"engine.kernels={name} cannot run on {device}: {'; '.join(passed_over)}; use auto"
    )
