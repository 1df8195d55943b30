"""The parts of a decoder block: RMSNorm, attention with rotary positions, SwiGLU, KV cache.

Invariant: plain PyTorch. Nothing here knows of processes, devices or the environment, and every
parameter carries its Hugging Face name. Shape suffixes are those of docs/notation.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtrain.config.model import ModelConfig
from llmtrain.model.cache import KeyValueCache
from llmtrain.ops.attention.spec import AttentionFunction, AttentionSpec
from llmtrain.ops.cross_entropy import VocabPartition
from llmtrain.ops.kernels import TORCH_KERNELS, Kernels
from llmtrain.ops.rope import Rotation
from llmtrain.ops.wide import linear

LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [..., I], weight [O, I], bias [O] or None) -> [..., O]."""


@dataclass(frozen=True, slots=True)
class BlockContext:
    """What all blocks of one forward share.

    It is no pytree and no tensor, so wrappers that cast a module's tensor arguments to a lower
    precision leave the angles alone.
    """

    rotation: Rotation
    """Cosines and sines of the positions."""
    spec: AttentionSpec
    """Which keys each query sees."""
    cache: KeyValueCache | None = None
    """Keys and values of earlier tokens, in generation."""


class Linear(nn.Linear):
    """A linear map whose weights are zero until ``initialize_model`` or a checkpoint fills them."""

    partition: VocabPartition | None = None
    """Of an output head that holds a part of the vocabulary: which."""
    product: LinearFunction | None = None
    """Multiplies in another way than ``ops.wide.linear``, where set (parallel/float8.py)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device)
        self.lora_A: Linear | None = None
        self.lora_B: Linear | None = None
        self.lora_scale = 1.0

    def reset_parameters(self) -> None:
        """Draw no random numbers; starting values are model/init.py's alone."""
        _zero(self)

    def adapt(self, rank: int, scale: float) -> None:
        """Put an adapter beside the matrix (model/adapter.py)."""
        self.lora_A = Linear(self.in_features, rank, bias=False)
        self.lora_B = Linear(rank, self.out_features, bias=False)
        self.lora_scale = scale

    def adapted(self, out: Tensor, input: Tensor) -> Tensor:
        """Add to the product ``out`` what the adapter, where there is one, makes of ``input``."""
        if self.lora_A is None or self.lora_B is None:
            return out
        added: Tensor = self.lora_B(self.lora_A(input)) * self.lora_scale
        return out + added

    def forward(self, input: Tensor) -> Tensor:
        """Map the last dim."""
        return self.adapted((self.product or linear)(input, self.weight, self.bias), input)


class Embedding(nn.Embedding):
    """A table of vectors, zero until ``initialize_model`` or a checkpoint fills it."""

    partition: VocabPartition | None = None
    """Of a table that holds a part of the vocabulary: which."""

    def reset_parameters(self) -> None:
        """Draw no random numbers; starting values are model/init.py's alone."""
        _zero(self)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dim."""
        return self.kernels.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(nn.Module):
    """RMSNorm of a sum, in one operation with it.

    The sum is taken in here, and not beside it, so that what gathers parameters around a module's
    forward (FSDP2, ZeRO 3) has gathered the weight.
    """

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query self-attention (arXiv:2305.13245)."""

    def __init__(
        self, config: ModelConfig, layer: int, attention: AttentionFunction, kernels: Kernels
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim, eps = config.head_size, config.rms_norm_eps
        self.attention = attention
        self.kernels = kernels
        size_D = config.hidden_size
        size_Q = config.num_attention_heads * self.head_dim
        size_KV = config.num_key_value_heads * self.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(size_D, size_Q, bias=bias)
        self.k_proj = Linear(size_D, size_KV, bias=bias)
        self.v_proj = Linear(size_D, size_KV, bias=bias)
        self.o_proj = Linear(size_Q, size_D, bias=config.attention_output_bias)
        self.q_norm = RMSNorm(self.head_dim, eps, kernels) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps, kernels) if config.qk_norm else None

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Mix the tokens of each document; [B, S, D] to [B, S, D]."""
        q_BSNH = self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSGH = self.k_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BTGH = self.v_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSNH, k_BSGH = self.q_norm(q_BSNH), self.k_norm(k_BSGH)
        cos, sin = context.rotation.cos, context.rotation.sin
        q_BSNH, k_BTGH = self.kernels.rotate(q_BSNH, k_BSGH, cos, sin)
        if context.cache is not None:
            k_BTGH, v_BTGH = context.cache.append(self.layer, k_BTGH, v_BTGH)
        out_BSNH, _ = self.attention(q_BSNH, k_BTGH, v_BTGH, context.spec)
        projected: Tensor = self.o_proj(out_BSNH.flatten(2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Transform each token alone; [B, S, D] to [B, S, D]."""
        h_BSF = self.kernels.swiglu(self.gate_proj(x_BSD), self.up_proj(x_BSD))
        out: Tensor = self.down_proj(h_BSF)
        return out


def _zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.zero_()


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream.

    With ``post_norms`` what each gives is normalised too, before it is added.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        attention: AttentionFunction,
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, kernels)
        self.self_attn = Attention(config, layer, attention, kernels)
        self.post_attention_layernorm = AddRMSNorm(size, eps, kernels)
        self.mlp = FeedForward(config, kernels)
        norms = config.post_norms
        self.post_self_attn_layernorm = RMSNorm(size, eps, kernels) if norms else None
        self.post_mlp_layernorm = RMSNorm(size, eps, kernels) if norms else None

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Apply the block; [B, S, D] to [B, S, D]."""
        mixed_BSD = self.self_attn(self.input_layernorm(x_BSD), context)
        if self.post_self_attn_layernorm is not None:
            mixed_BSD = self.post_self_attn_layernorm(mixed_BSD)
        normed_BSD, x_BSD = self.post_attention_layernorm(mixed_BSD, x_BSD)
        changed_BSD = self.mlp(normed_BSD)
        if self.post_mlp_layernorm is not None:
            changed_BSD = self.post_mlp_layernorm(changed_BSD)
        out: Tensor = x_BSD + changed_BSD
        return out
