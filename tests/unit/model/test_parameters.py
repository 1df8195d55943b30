"""The parameter table agrees with the model."""

from dataclasses import replace

import torch

from llmtrain.config.model import ModelConfig
from llmtrain.model.parameters import num_parameters, parameter_table
from llmtrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    attention_output_bias=True,
    qk_norm=True,
)


def test_the_table_lists_the_model_in_its_order() -> None:
    table = parameter_table(CONFIG)
    expected = [(n, tuple(p.shape)) for n, p in Transformer(CONFIG).named_parameters()]
    assert [(p.name, p.shape) for p in table] == expected
    assert all(p.trainable and p.tied_to is None for p in table)
    assert sum(p.numel for p in table) == num_parameters(CONFIG)


def test_matrices_decay_and_nothing_else() -> None:
    for parameter in parameter_table(CONFIG):
        vector = parameter.name.endswith(("norm.weight", "bias"))
        assert parameter.decay is not vector, parameter.name


def test_a_tied_head_is_listed_as_an_alias_and_not_counted() -> None:
    tied = replace(CONFIG, tie_word_embeddings=True)
    alias = parameter_table(tied)[-1]
    assert (alias.name, alias.tied_to) == ("lm_head.weight", "model.embed_tokens.weight")
    stored = sum(p.numel() for p in Transformer(tied).parameters())
    assert num_parameters(tied) == num_parameters(tied, embedding=False) == stored
    assert num_parameters(CONFIG) - num_parameters(CONFIG, embedding=False) == 96 * 24


def test_the_table_needs_no_memory() -> None:
    huge = replace(CONFIG, vocab_size=10**9, hidden_size=4096)
    assert num_parameters(huge) > 8 * 10**12
    assert torch.get_default_device().type == "cpu"
