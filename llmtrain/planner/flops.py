"""Floating-point operations of training, in closed form from the model's config.

Convention: ``6 (N - N_embedding) + 12 L d s`` per token, the attention term in full although a
causal mask needs half; the causal half is given beside it. Recomputed forwards never count.

    flops_per_token(config, sequence_length=4096) / 1e9   # GFLOP per token, forward and backward
"""

from llmtrain.config.model import ModelConfig

CONVENTION = "6(N - N_embedding) + 12 L d s, full attention"
"""Name of the convention, logged beside every MFU."""

PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "L4": 121.0,
    "V100": 125.0,
}
"""Dense bf16 (V100: fp16) tensor-core peak by a part of the device's name, the first match wins."""


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
    block = attention + 3 * D * config.intermediate_size + 2 * D
    return config.num_hidden_layers * block + D + config.vocab_size * D


def peak_tflops(device_name: str) -> float | None:
    """Peak TFLOP/s of a device by its name, e.g. ``NVIDIA H200``; None where it is not known."""
    for part, peak in PEAK_TFLOPS.items():
        if part in device_name:
            return peak
    return None
