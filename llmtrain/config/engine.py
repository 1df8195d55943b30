"""What runs a step: engine, precision, kernels, compilation, and what DeepSpeed adds.

No field but ``precision`` changes the numbers a run computes beyond the rounding of its type.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What runs the step and in which precision."""

    kind: Literal["native", "deepspeed"] = "native"
    """``native``: PyTorch and all axes of the mesh; ``deepspeed``: ZeRO and its own pipeline."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Compute type; bf16 keeps fp32 master weights, gradients and reductions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; ``auto`` takes CUDA where it is present."""
    attention: Literal["auto", "sdpa", "reference"] = "auto"
    """Attention backend; ``auto`` takes the fastest that is available and logs which."""
    compile: bool = False
    """Compile every block with torch.compile."""
    loss_chunk_tokens: int = 1024
    """Tokens whose logits exist at one time in the loss; smaller is less memory."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms; the same layout then repeats bit by bit."""
    timeout_s: float = 600.0
    """Seconds a collective may wait for a peer before the run fails."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """ZeRO stage, offload and DeepSpeed's own keys."""

    def __post_init__(self) -> None:
        """Refuse empty chunks and time-outs."""
        if problems := below(self, 1, "loss_chunk_tokens") + not_positive(self, "timeout_s"):
            raise ConfigError(problems)
