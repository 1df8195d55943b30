"""The architecture of a model, in the field names of Hugging Face configs.

One set of fields describes LLaMA 1/2/3, Qwen2/2.5, Qwen3, Mistral and GLM-4; nothing depends on a
model's name. Presets are in ``conf/model/``.
"""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.fields import below, not_positive
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRopeScaling:
    """Position interpolation (arXiv:2306.15595): every frequency is divided."""

    kind: Literal["linear"] = "linear"
    """Which scaling this is."""
    factor: float
    """How many times longer the context becomes."""

    def __post_init__(self) -> None:
        """Refuse a factor that stretches nothing."""
        if problems := not_positive(self, "factor"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3RopeScaling:
    """LLaMA 3.1: low frequencies are divided, high ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    """Which scaling this is."""
    factor: float
    """How many times longer the context becomes."""
    original_max_position_embeddings: int
    """Length in tokens the frequencies were trained for."""
    low_freq_factor: float = 1.0
    """Wavelengths above original length / this are divided by ``factor``."""
    high_freq_factor: float = 4.0
    """Wavelengths below original length / this stay as they are."""

    def __post_init__(self) -> None:
        """Refuse lengths below 1 and a ramp that does not rise."""
        problems = below(self, 1, "original_max_position_embeddings")
        problems += not_positive(self, "factor", "low_freq_factor", "high_freq_factor")
        if not problems and self.low_freq_factor >= self.high_freq_factor:
            problems.append(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnRopeScaling:
    """YaRN (arXiv:2309.00071): a ramp over dimensions, and a factor on the scores."""

    kind: Literal["yarn"] = "yarn"
    """Which scaling this is."""
    factor: float
    """How many times longer the context becomes."""
    original_max_position_embeddings: int
    """Length in tokens the frequencies were trained for."""
    beta_fast: float = 32.0
    """Rotations over the original length above which a dimension is kept."""
    beta_slow: float = 1.0
    """Rotations over the original length below which a dimension is interpolated."""
    attention_factor: float | None = None
    """Factor on cos and sin; null means 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        """Refuse lengths below 1 and a ramp that does not rise."""
        problems = below(self, 1, "original_max_position_embeddings")
        problems += not_positive(self, "factor", "beta_fast", "beta_slow", "attention_factor")
        if not problems and self.beta_slow >= self.beta_fast:
            problems.append(f"beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}")
        if problems:
            raise ConfigError(problems)


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling
"""How rotary frequencies are stretched beyond the trained length, chosen by ``kind``."""


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
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies; null means none."""
    partial_rotary_factor: float = 1.0
    """Share of a head's dims that RoPE turns (GLM-4: 0.5); the others carry no position."""
    qk_norm: bool = False
    """RMSNorm over the head dimension of queries and keys before RoPE (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    attention_output_bias: bool = False
    """Bias on the attention output projection."""
    post_norms: bool = False
    """RMSNorm also on what attention and feed-forward give, before it is added (GLM-4 0414)."""
    sliding_window: int | None = None
    """Number of tokens, itself included, a token attends to; null means all before it."""
    attn_logit_softcapping: float | None = None
    """Attention scores x become c tanh(x / c) (Gemma 2: 50); null means they stay as they are."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as the output head."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initialisation of weights."""
    mup_base_width: int | None = None
    """hidden_size at which rate and initializer_range were tuned, for muP; null means no muP.

    With it both hold at every hidden_size (model/mup.py); widen heads and intermediate_size in
    proportion and keep head_dim.
    """
    adapter: AdapterConfig | None = None
    """Train low-rank matrices beside those of the model, which stays as it is; null trains it."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        problems = below(
            self, 1, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim",
            "sliding_window", "mup_base_width",
        )  # fmt: skip
        problems += not_positive(
            self, "rms_norm_eps", "rope_theta", "initializer_range", "attn_logit_softcapping"
        )
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
        if not problems:
            problems += self._rotary_problems()
        if problems:
            raise ConfigError(problems)

    def _rotary_problems(self) -> list[str]:
        """What keeps RoPE from turning pairs of dims of a head."""
        if self.head_size % 2:
            return [f"a head of width {self.head_size} is odd; RoPE needs an even width"]
        share, turned = self.partial_rotary_factor, self.rotary_size
        if not 0 < share <= 1 or turned < 2 or turned % 2:
            return [
                f"model.partial_rotary_factor={share} of heads of width {self.head_size} turns "
                f"{turned} dims; it must be above 0, at most 1 and turn an even number of them"
            ]
        if share != 1 and isinstance(self.rope_scaling, YarnRopeScaling):
            return [
                f"model.partial_rotary_factor={share} found with rope_scaling.kind=yarn, whose "
                "factor on the scores is for heads that turn whole; use 1.0 or another kind"
            ]
        return []

    @property
    def head_size(self) -> int:
        """Width H of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Dims of a head that RoPE turns."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def width_multiplier(self) -> float:
        """How many times wider than the base of muP the model is; 1 without muP."""
        return 1.0 if self.mup_base_width is None else self.hidden_size / self.mup_base_width
