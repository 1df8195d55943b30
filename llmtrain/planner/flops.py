"""Floating-point operations of training, in closed form from the model's config.

Convention: ``6 (N - N_embedding) + 12 L d s`` per token, the attention term in full although a
causal mask needs half; the causal half is given beside it. Recomputed forwards never count.

    flops_per_token(config, sequence_length=4096) / 1e9   # GFLOP per token, forward and backward
"""

from llmtrain.config.model import ModelConfig

CONVENTION = "6(N - N_embedding) + 12 L d s, full attention"
"""Name of the convention, logged beside every MFU."""


def flops_per_token(config: ModelConfig, sequence_length: int, *, causal: bool = False) -> float:
    """Operations of forward and backward per token; ``causal`` counts half of the attention."""
    width = config.num_attention_heads * config.head_size
    attention = 12 * config.num_hidden_layers * width * sequence_length
    return 6 * num_matmul_parameters(config) + (attention / 2 if causal else attention)


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
