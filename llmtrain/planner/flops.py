"""Floating-point operations of training, in closed form from the model's config.

Convention: ``6 (N - N_embedding) + 12 L d s`` per token, the attention term in full although a
causal mask needs half; the causal half is given beside it. Recomputed forwards never count. Beside
an adapter the model's own matrices have no gradient: 4 for each of their parameters, 6 for each of
the adapter's.

    flops_per_token(config, sequence_length=4096) / 1e9   # GFLOP per token, forward and backward
"""

from llmtrain.config.model import ModelConfig
from llmtrain.planner.memory import block_shapes, num_elements

CONVENTION = "6(N - N_embedding) + 12 L d s, full attention"
"""Name of the convention."""


def flops_per_token(config: ModelConfig, sequence_length: int, *, causal: bool = False) -> float:
    """Operations of forward and backward per token; ``causal`` counts half of the attention."""
    width = config.num_attention_heads * config.head_size
    attention = 12 * config.num_hidden_layers * width * sequence_length
    products = (6 if config.adapter is None else 4) * num_matmul_parameters(config)
    products += 6 * num_adapter_parameters(config)
    return products + (attention / 2 if causal else attention)


def convention(config: ModelConfig) -> str:
    """Name what ``flops_per_token`` counts for a model; logged beside every MFU."""
    if config.adapter is None:
        return CONVENTION
    return f"{CONVENTION.replace('6(', '4(', 1)}; 6 for each parameter of the adapter"


def num_adapter_parameters(config: ModelConfig) -> int:
    """Parameters of the adapter, 0 where there is none."""
    block = block_shapes(config, 0).items()
    return config.num_hidden_layers * num_elements(p for p in block if ".lora_" in p[0])


def num_matmul_parameters(config: ModelConfig) -> int:
    """Parameters without the input embedding: N - N_embedding.

    With tied embeddings the one matrix counts, for as the output head it multiplies.
    """
    D, H = config.hidden_size, config.head_size  # noqa: N806
    queries, keys = config.num_attention_heads * H, config.num_key_value_heads * H
    attention = D * (queries + 2 * keys) + queries * D
    if config.attention_bias:
        attention += queries + 2 * keys
    if config.attention_output_bias:
        attention += D
    if config.qk_norm:
        attention += 2 * H
    norms = (4 if config.post_norms else 2) * D
    block = attention + 3 * D * config.intermediate_size + norms
    return config.num_hidden_layers * block + D + config.vocab_size * D
