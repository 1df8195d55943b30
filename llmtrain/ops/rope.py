"""Rotary position embeddings (arXiv:2104.09864) in the layout of Hugging Face models.

Dimension i of a head turns together with dimension i + H/2. Frequencies are the published fp32
values in every precision, so that weights trained elsewhere keep their meaning; angles are taken in
fp32, or in fp64 where the model is.

    rotation = Rotation.at(positions, rope_frequencies(128, 500000.0), torch.float32)
    q, k = rotate(q, k, rotation.cos, rotation.sin)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.model import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    rotary_dim: int | None = None,
) -> tuple[Tensor, float]:
    """Return the angle per position of each pair of dimensions and the factor on cos and sin.

    Where only ``rotary_dim`` of the dimensions turn, they are the first pairs; the others have
    frequency 0, which turns nothing.

    Returns:
        Frequencies, fp32 [H / 2] on the CPU, and the factor (1 but for YaRN).
    """
    turned = rotary_dim or head_dim
    exponents = torch.arange(0, turned, 2, dtype=torch.int64, device="cpu").float() / turned
    frequencies, factor = _scaled(1.0 / theta**exponents, theta, scaling)
    return F.pad(frequencies, (0, (head_dim - turned) // 2)), factor


def _scaled(frequencies: Tensor, theta: float, scaling: RopeScaling | None) -> tuple[Tensor, float]:
    """Stretch the frequencies by what the config asks for."""
    match scaling:
        case None:
            return frequencies, 1.0
        case LinearRopeScaling():
            return frequencies / scaling.factor, 1.0
        case Llama3RopeScaling():
            return _llama3(frequencies, scaling), 1.0
        case YarnRopeScaling():
            return _yarn(frequencies, theta, scaling)


def _llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """LLaMA 3.1: long wavelengths are interpolated, short ones kept, a ramp between."""
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = length / (2 * math.pi / frequencies)
    kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, theta: float, scaling: YarnRopeScaling) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, section 3.2): a ramp over dimensions, and a factor on the scores."""
    head_dim = 2 * frequencies.numel()

    def dimension_of(rotations: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), head_dim - 1)
    dims = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    kept = 1 - ((dims - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
    scaled = frequencies / scaling.factor * (1 - kept) + frequencies * kept
    default = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return scaled, default if scaling.attention_factor is None else scaling.attention_factor


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of one micro-batch; computed once and shared by all layers."""

    cos: Tensor
    """Cosines, fp32 or fp64 [B, S, 1, H]."""
    sin: Tensor
    """Sines, the first half negated, fp32 or fp64 [B, S, 1, H]."""

    @classmethod
    def at(
        cls, positions: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
    ) -> "Rotation":
        """Tabulate the angles of ``positions`` [B, S]; ``dtype`` is the model's."""
        angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions[:, :, None, None].to(angle_dtype) * frequencies.to(angle_dtype)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries [B, S, N, H] and keys [B, S, G, H] by the angles of their positions.

    ``cos`` and ``sin`` are those of a ``Rotation``; products are in their type, results in that of
    ``q`` and ``k``. The backward turns by the negative angle.
    """
    if torch.compiler.is_compiling():
        return _formula(q, cos, sin), _formula(k, cos, sin)
    turned_q: Tensor = _Rotate.apply(q, cos, sin)  # type: ignore[no-untyped-call]
    turned_k: Tensor = _Rotate.apply(k, cos, sin)  # type: ignore[no-untyped-call]
    return turned_q, turned_k


def _formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn in one expression, which a compiler makes one pass of."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Three passes each way, and nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    value = x.to(cos.dtype)
    out = value * cos
    out[..., :half].addcmul_(value[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(value[..., :half], sin[..., half:], value=sign)
    return out.to(x.dtype)
