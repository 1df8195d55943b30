"""Blocks are shared out by cost, and every stage gets some."""

import itertools

import pytest

from llmtrain.config.model import ModelConfig
from llmtrain.parallel.stage import split_layers


def model(layers: int, vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )


@pytest.mark.parametrize(("layers", "pp"), list(itertools.product([4, 7, 32], [1, 2, 3, 4])))
def test_stages_cover_the_blocks_in_order(layers: int, pp: int) -> None:
    ranges = split_layers(model(layers, 1000), pp)

    assert [i for r in ranges for i in r] == list(range(layers))
    assert len(ranges) == pp
    assert all(len(r) for r in ranges)


def test_a_small_head_splits_evenly() -> None:
    assert [len(r) for r in split_layers(model(8, 8), 4)] == [2, 2, 2, 2]


def test_a_heavy_head_takes_blocks_from_the_last_stage() -> None:
    block = 2 * 64 * 16 * 8 + 3 * 64 * 128

    assert [len(r) for r in split_layers(model(8, 4 * block // 64), 2)] == [5, 3]
