"""Starting values: the same on every sharding, of the right spread, another for every name."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.model.init import initialize_, initialize_model
from llmtrain.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
    qk_norm=True,
)
SHAPE = (301, 257)


def shard(
    slices: tuple[slice, ...],
    shape: tuple[int, ...] = SHAPE,
    seed: int = 0,
    name: str = "x.weight",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    sizes = [len(range(*s.indices(n))) for s, n in zip(slices, shape, strict=True)]
    local = torch.full(sizes, math.nan, dtype=dtype)
    initialize_(local, name, shape, slices, CONFIG, seed)
    return local


FULL = (slice(None), slice(None))


@pytest.mark.parametrize(
    "slices",
    [
        (slice(0, 101), slice(None)),
        (slice(101, 300), slice(0, 257)),
        (slice(300, 301), slice(None)),
        (slice(None), slice(0, 64)),
        (slice(None), slice(193, 257)),
        (slice(7, 9), slice(3, 5)),
        (slice(40, 40), slice(None)),
        (slice(301, 400), slice(None)),
    ],
)
def test_a_shard_has_the_bits_of_the_whole(slices: tuple[slice, ...]) -> None:
    assert shard(slices).equal(shard(FULL)[slices])


def test_a_shard_of_three_dims_and_of_one() -> None:
    shape = (5, 6, 7)
    whole = shard((slice(None),) * 3, shape)
    for slices in (
        (slice(1, 3), slice(2, 6), slice(1, 4)),
        (slice(1, 3), slice(None), slice(None)),
        (slice(None), slice(2, 3), slice(None)),
    ):
        assert shard(slices, shape).equal(whole[slices])
    assert shard((slice(3, 9),), (11,)).equal(shard((slice(None),), (11,))[3:9])


def test_a_strided_view_is_filled_like_a_plain_tensor() -> None:
    storage = torch.empty(257, 301)
    initialize_(storage.T, "x.weight", SHAPE, FULL, CONFIG, 0)
    assert storage.T.equal(shard(FULL))


def test_values_are_normal_with_the_right_spread() -> None:
    values = shard(FULL, (1000, 1000)).double() / CONFIG.initializer_range
    count = values.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (values**power).mean() - moment
        assert error.abs() < 4.5 * math.sqrt(variance / count), power
    share = (values.abs() < 1).double().mean()
    assert abs(share - math.erf(1 / math.sqrt(2))) < 4.5 * math.sqrt(0.22 / count)
    neighbours = (values[:, 1:] * values[:, :-1]).mean()
    assert neighbours.abs() < 4.5 / math.sqrt(count)


def test_seed_and_name_choose_the_stream() -> None:
    base = shard(FULL)
    for other in (shard(FULL, seed=1), shard(FULL, name="y.weight")):
        correlation = (base * other).mean() / CONFIG.initializer_range**2
        assert correlation.abs() < 4.5 / math.sqrt(base.numel())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_casts(dtype: torch.dtype) -> None:
    assert shard(FULL, dtype=dtype).equal(shard(FULL).to(dtype))


def test_values_do_not_drift_between_versions() -> None:
    found = shard((slice(0, 1), slice(0, 3)))[0].tolist()
    pinned = [-0.004330102354288101, -0.013783874921500683, 0.0131924943998456]
    assert found == pytest.approx(pinned, rel=1e-7)


def test_kinds_of_parameters() -> None:
    with torch.device("meta"):
        model = Transformer(CONFIG)
    model.to_empty(device="cpu")
    initialize_model(model, CONFIG, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert parameter.eq(1).all(), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name
        else:
            narrowed = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(4) if narrowed else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


def test_a_stage_and_a_located_shard_start_like_the_whole() -> None:
    whole = Transformer(CONFIG)
    initialize_model(whole, CONFIG, seed=3)
    stage = Transformer(CONFIG, layers=range(1, 2), embedding=False)
    initialize_model(stage, CONFIG, seed=3)
    weights = dict(whole.named_parameters())
    for name, parameter in stage.named_parameters():
        assert parameter.equal(weights[name]), name

    def second_half(
        name: str, parameter: Tensor
    ) -> tuple[Tensor, tuple[int, ...], tuple[slice, ...]]:
        shape = (2 * parameter.shape[0], *parameter.shape[1:])
        rows = slice(parameter.shape[0], shape[0])
        return parameter.detach(), shape, (rows, *(slice(0, n) for n in shape[1:]))

    double = Transformer(replace(CONFIG, vocab_size=192))
    initialize_model(double, CONFIG, seed=3)
    half = Transformer(CONFIG)
    initialize_model(half, CONFIG, seed=3, locate=second_half)
    found = half.model.embed_tokens.weight  # type: ignore[union-attr]
    assert found.equal(double.model.embed_tokens.weight[96:])  # type: ignore[union-attr]
