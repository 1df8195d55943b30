"""The backends by name, and the choice of one for a run.

Invariant: a backend runs only where it gives what the run needs; the choice is logged, with the
reason for each faster one that was passed over.

    attention = select_attention("auto", torch.device("cpu"), Needs(head_size=64, dtype=bf16))
    out, lse = attention(q, k, v, spec)
"""

import logging

import torch

from llmtrain.config.engine import EngineConfig
from llmtrain.config.model import ModelConfig
from llmtrain.errors import ConfigError
from llmtrain.ops.attention.flash import (
    flash2_available,
    flash3_available,
    flash3_supports,
    flash4_available,
    flash4_supports,
    flash_supports,
    varlen_available,
    varlen_supports,
)
from llmtrain.ops.attention.flex import block_mask, flex_attention, flex_available, flex_supports
from llmtrain.ops.attention.plain import PLAIN_BLOCKS, REFERENCE_BLOCKS
from llmtrain.ops.attention.reference import reference_attention
from llmtrain.ops.attention.sdpa import SDPA_BLOCKS, sdpa_attention
from llmtrain.ops.attention.segments import segments_of
from llmtrain.ops.attention.spec import (
    AttentionBackend,
    AttentionFunction,
    AttentionSpec,
    BlockAttention,
    Needs,
)
from llmtrain.ops.attention.varlen import segmented_attention, segmented_blocks

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Type of queries, keys and values by ``engine.precision``."""


def _everywhere(device: torch.device) -> str | None:
    return None


def _everything(needs: Needs, device: torch.device) -> str | None:
    return None


def _cpu_only(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on a CPU, this is a {device.type}"


def _make_segments(spec: AttentionSpec, dtype: torch.dtype) -> None:
    if segments_of(spec) is None:
        spec.bias(dtype)


def _make_bias(spec: AttentionSpec, dtype: torch.dtype) -> None:
    if spec.softcap is not None:
        spec.mask  # noqa: B018 kept by the spec
    elif not spec.causal_rows:
        spec.bias(dtype)


def _make_blocks(spec: AttentionSpec, dtype: torch.dtype) -> None:
    block_mask(spec)


ATTENTION: dict[str, AttentionBackend] = {
    "flash3": AttentionBackend(
        segmented_attention("flash3"), segmented_blocks("flash3"),
        flash3_available, flash3_supports, _make_segments,
    ),
    "flash4": AttentionBackend(
        segmented_attention("flash4"), segmented_blocks("flash4"),
        flash4_available, flash4_supports, _make_segments,
    ),
    "flash2": AttentionBackend(
        segmented_attention("flash2"), segmented_blocks("flash2"),
        flash2_available, flash_supports, _make_segments,
    ),
    "varlen": AttentionBackend(
        segmented_attention("varlen"), segmented_blocks("varlen"),
        varlen_available, varlen_supports, _make_segments,
    ),
    "flex": AttentionBackend(
        flex_attention, PLAIN_BLOCKS, flex_available, flex_supports, _make_blocks
    ),
    "documents": AttentionBackend(
        segmented_attention("documents"), segmented_blocks("documents"),
        _cpu_only, _everything, _make_segments,
    ),
    "sdpa": AttentionBackend(sdpa_attention, SDPA_BLOCKS, _everywhere, _everything, _make_bias),
    "reference": AttentionBackend(
        reference_attention, REFERENCE_BLOCKS, _everywhere, _everything, _make_bias
    ),
}  # fmt: skip
"""Backends by name, the fastest first."""


def needs_of(model: ModelConfig, engine: EngineConfig, training: bool = True) -> Needs:
    """Tell what a run asks of attention."""
    return Needs(
        head_size=model.head_size,
        dtype=DTYPES[engine.precision],
        sliding_window=model.sliding_window is not None,
        softcap=model.attn_logit_softcapping is not None,
        deterministic=engine.deterministic,
        training=training,
    )


def why_not(name: str, device: torch.device, needs: Needs | None = None) -> str | None:
    """Give the reason why backend ``name`` cannot run; None where it can."""
    backend = ATTENTION[name]
    reason = backend.available(device)
    if reason is None and needs is not None:
        reason = backend.supports(needs, device)
    return reason


def backend_of(function: AttentionFunction) -> AttentionBackend | None:
    """Find the backend of a function; None where it is none's."""
    return next((b for b in ATTENTION.values() if b.function is function), None)


def block_attention(function: AttentionFunction) -> BlockAttention:
    """Give the block form of a backend's function."""
    return next(b.block for b in ATTENTION.values() if b.function is function)


def choose_attention(name: str, device: torch.device, needs: Needs | None = None) -> str:
    """Give the name of the backend that ``select_attention`` takes.

    Raises:
        ConfigError: ``name`` is unknown, or its backend cannot run, or not as needed.
    """
    return _choice(name, device, needs)[0]


def _choice(name: str, device: torch.device, needs: Needs | None) -> tuple[str, list[str]]:
    """Give the backend to take, and the reason for each faster one that is passed over."""
    if name != "auto" and name not in ATTENTION:
        raise ConfigError(f"engine.attention={name} is unknown; use one of auto, {_names()}")
    passed: list[str] = []
    for candidate in ATTENTION if name == "auto" else (name,):
        if (reason := why_not(candidate, device, needs)) is None:
            return candidate, passed
        passed.append(f"{candidate}: {reason}")
    if name != "auto":
        raise ConfigError(f"engine.attention={name} cannot run on {device}: {reason}; use auto")
    raise ConfigError(f"no attention backend can run on {device}: {'; '.join(passed)}")


def select_attention(
    name: str, device: torch.device, needs: Needs | None = None
) -> AttentionFunction:
    """Choose the backend ``name``, or the fastest one that can for ``auto``; log it.

    Raises:
        ConfigError: ``name`` is unknown, or its backend cannot run, or not as needed.
    """
    chosen, passed = _choice(name, device, needs)
    why = f"; passed over: {'; '.join(passed)}" if passed else ""
    logger.info("attention backend: %s on %s%s", chosen, device.type, why)
    return ATTENTION[chosen].function


def _names() -> str:
    return ", ".join(ATTENTION)
