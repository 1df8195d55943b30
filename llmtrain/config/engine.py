"""What runs a step: engine, precision, kernels, compilation, and what DeepSpeed adds.

No field but ``precision``, ``fp8``, ``fp8_all_gather`` and ``master_dtype`` changes the numbers a
run computes beyond the rounding of its type.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config.deepspeed import passthrough_problems
from llmtrain.config.fields import below, not_positive
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """What DeepSpeed does beside the layout; read by engine.kind=deepspeed alone."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """Shared by data ranks: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer state and update in host memory."""
    offload_parameters: bool = False
    """Keep parameters in host memory (zero_stage 3)."""
    config: Mapping[str, object] = field(default_factory=dict)
    """DeepSpeed's own JSON keys for what llmtrain does not model; contradictions are refused."""

    def __post_init__(self) -> None:
        """Refuse keys that llmtrain sets, cannot honour or does not know."""
        problems = passthrough_problems(
            self.config,
            zero_stage=self.zero_stage,
            offload_optimizer=self.offload_optimizer,
            offload_parameters=self.offload_parameters,
        )
        if problems:
            raise ConfigError(problems)


_ONLY_BF16 = (
    ("fp8", "none", "what is not in fp8 is in bf16"),
    ("master_dtype", "fp32", "parameters are kept in the type of the products"),
)
"""Fields that only bf16 runs have a use for: name, usual value, why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What runs the step and in which precision."""

    kind: Literal["native", "deepspeed"] = "native"
    """``native``: PyTorch and all axes of the mesh; ``deepspeed``: ZeRO and its own pipeline."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute type; bf16 keeps fp32 gradients and reductions and, by default, master weights."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Products of the blocks' matrices in fp8 (bf16 runs): one scale per tensor, or per row.

    Tensorwise is fastest, rowwise keeps more of outlying values. Sizes must be multiples of 16.
    """
    fp8_all_gather: bool = False
    """fp8=tensorwise with dp_shard: gather weights in fp8, half the bytes of bf16."""
    master_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs: type in which parameters are kept and updated.

    bf16 keeps no fp32 copy; updates are rounded stochastically (docs/precision.md).
    """
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``auto`` takes CUDA where it is present."""
    attention: Literal[
        "auto", "flash3", "flash4", "flash2", "varlen", "flex", "documents", "sdpa", "reference"
    ] = "auto"
    """Attention backend (docs/attention.md); ``auto`` takes the fastest that can and logs why."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Norms, rotary positions, SwiGLU and the loss: fused Triton kernels or plain PyTorch.

    ``auto`` takes Triton where the device can run it and logs which.
    """
    compile: bool = False
    """Compile every block with torch.compile."""
    cuda_graphs: bool = False
    """Record every compiled block as CUDA graphs: fewer launches where blocks are small."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time in the loss; smaller is less memory."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms; the same layout then repeats bit by bit."""
    timeout_s: float = 600.0
    """Seconds a collective may wait for a peer before the run fails."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """ZeRO stage, offload and DeepSpeed's own keys."""

    def __post_init__(self) -> None:
        """Refuse empty chunks and time-outs, and types that the precision has no use for."""
        problems = below(self, 1, "loss_chunk_tokens") + not_positive(self, "timeout_s")
        problems += [
            f"{name}={getattr(self, name)} found with precision={self.precision}: {why}; use "
            f"precision=bf16 or {name}={usual}"
            for name, usual, why in _ONLY_BF16
            if self.precision != "bf16" and getattr(self, name) != usual
        ]
        if self.fp8_all_gather and self.fp8 != "tensorwise":
            problems.append(
                f"fp8_all_gather=true found with fp8={self.fp8}: only whole tensors have one scale "
                "that all shards share; use fp8=tensorwise or fp8_all_gather=false"
            )
        if problems:
            raise ConfigError(problems)
