"""The closed form against the model's own parameter table."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.model import ModelConfig
from llmtrain.model.init import initialize_model
from llmtrain.model.parameters import num_parameters
from llmtrain.model.transformer import Transformer
from llmtrain.planner.devices import peak_tflops
from llmtrain.planner.flops import (
    flops_per_token,
    num_adapter_parameters,
    num_matmul_parameters,
)

SMALL = ModelConfig(
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
VARIANTS = [
    SMALL,
    replace(SMALL, attention_bias=True, attention_output_bias=True),
    replace(SMALL, qk_norm=True, head_dim=16),
    replace(SMALL, tie_word_embeddings=True),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_parameters_equal_the_table(config: ModelConfig) -> None:
    assert num_matmul_parameters(config) == num_parameters(config, embedding=False)


def test_attention_is_full_by_convention_and_half_beside_it() -> None:
    attention = 12 * 3 * 24 * 128
    assert flops_per_token(SMALL, 128) == 6 * num_matmul_parameters(SMALL) + attention
    assert flops_per_token(SMALL, 128) - flops_per_token(SMALL, 128, causal=True) == attention / 2


def test_llama_2_7b_at_4096() -> None:
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    assert num_matmul_parameters(config) == 6_738_415_616 - 32000 * 4096
    assert flops_per_token(config, 4096) / 1e9 == pytest.approx(46.09, abs=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 3050", None),
    ],
)
def test_known_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_beside_an_adapter_frozen_matrices_have_no_gradient() -> None:
    """Against torch's count of the matrix products of a whole model."""
    config = replace(SMALL, adapter=AdapterConfig(rank=4, targets=("q_proj", "o_proj", "up_proj")))
    model = Transformer(config, embedding=False)
    initialize_model(model, config, seed=0)
    tokens, width = 16, config.hidden_size
    hidden = torch.ones(1, tokens, width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(hidden, torch.arange(tokens)[None])).sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    norms = (2 * config.num_hidden_layers + 1) * width
    attention = 12 * config.num_hidden_layers * width * tokens
    assert num_adapter_parameters(config) == 3 * 4 * (48 + 48 + 64)
    assert products / tokens == flops_per_token(config, tokens) - attention - 4 * norms
