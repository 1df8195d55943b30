"""The architecture of a model, in the field names of Hugging Face configs.

One set of fields describes LLaMA 1/2/3, Qwen2/2.5, Qwen3 and Mistral; nothing depends on a model's
name. Presets are in ``conf/model/``.
"""

from dataclasses import dataclass
from typing import Literal

from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScalingConfig:
    """How rotary frequencies are stretched beyond the trained length."""

    kind: Literal["linear", "llama3", "yarn"]
    """Linear interpolation, LLaMA 3.1's banded scaling, or YaRN (arXiv:2309.00071)."""
    factor: float
    """How many times longer the context becomes."""
    original_max_position_embeddings: int
    """Length in tokens the frequencies were trained for."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this stay as they are."""
    beta_fast: float = 32.0
    """yarn: rotations over the original length above which a dimension is kept."""
    beta_slow: float = 1.0
    """yarn: rotations over the original length below which a dimension is interpolated."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; null means 0.1 ln(factor) + 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder-only Transformer."""

    vocab_size: int
    """Rows of the embedding, padding included."""
    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width F of the SwiGLU feed-forward."""
    num_hidden_layers: int
    """Number of blocks."""
    num_attention_heads: int
    """Query heads N."""
    num_key_value_heads: int
    """Key and value heads G; divides the query heads."""
    head_dim: int | None = None
    """Width H of a head; null means hidden_size / num_attention_heads."""
    max_position_embeddings: int = 4096
    """Longest position the model is meant for, in tokens."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """Stretching of the rotary frequencies; null means none."""
    qk_norm: bool = False
    """RMSNorm over the head dimension of queries and keys before RoPE (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    attention_output_bias: bool = False
    """Bias on the attention output projection."""
    sliding_window: int | None = None
    """Number of tokens, itself included, a token attends to; null means all before it."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of weights."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        problems = [
            f"model.{name}={getattr(self, name)} must be at least 1"
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
            if getattr(self, name) < 1
        ]  # fmt: skip
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if not problems and self.head_dim is None and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}; set model.head_dim"
            )
        if not problems and self.head_size % 2:
            problems.append(f"a head of width {self.head_size} is odd; RoPE needs an even width")
        if self.sliding_window is not None and self.sliding_window < 1:
            problems.append(
                f"model.sliding_window={self.sliding_window} must be at least 1 or null"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def head_size(self) -> int:
        """Width H of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads
