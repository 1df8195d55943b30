"""Frequencies against transformers' own, rotation against complex numbers."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmtrain.config.model import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)
from llmtrain.ops.rope import Rotation, rope_frequencies, rotate

SCALINGS = [
    LinearRopeScaling(factor=4.0),
    Llama3RopeScaling(factor=8.0, original_max_position_embeddings=8192),
    Llama3RopeScaling(factor=32.0, original_max_position_embeddings=8192),
    Llama3RopeScaling(
        factor=8.0,
        original_max_position_embeddings=64,
        low_freq_factor=2.0,
        high_freq_factor=5.0,
    ),
    YarnRopeScaling(factor=4.0, original_max_position_embeddings=32768),
    YarnRopeScaling(
        factor=16.0,
        original_max_position_embeddings=4096,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.1,
    ),
]


def published(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    given = {name: value for name, value in asdict(scaling).items() if value is not None}
    length = given.get("original_max_position_embeddings", 2048)
    parameters: dict[str, Any] = {"rope_type": given.pop("kind"), "rope_theta": theta, **given}
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=int(scaling.factor * length),
        rope_parameters=parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, torch.device("cpu"))
    return frequencies, factor


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: f"{s.kind}-{s.factor}")
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0)])
def test_scaled_frequencies_are_the_published_ones(
    head_dim: int, theta: float, scaling: RopeScaling
) -> None:
    found, found_factor = rope_frequencies(head_dim, theta, scaling)
    expected, expected_factor = published(head_dim, theta, scaling)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=0)
    assert math.isclose(found_factor, expected_factor, rel_tol=1e-12)


def test_rotation_turns_pairs_as_complex_numbers() -> None:
    frequencies, _ = rope_frequencies(8, 100.0)
    positions = torch.tensor([[0, 1, 5, 0, 1]])
    x = torch.randn(1, 5, 3, 8, dtype=torch.float64)
    rotation = Rotation.at(positions, frequencies, 1.0, torch.float64)
    turned = rotate(x, x[:, :, 1:], rotation.cos, rotation.sin)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = positions[..., None, None] * frequencies.double()
    turned_pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned_pairs.real, turned_pairs.imag), dim=-1)
    torch.testing.assert_close(turned, (expected, expected[:, :, 1:]))


def test_scores_depend_on_the_distance_alone() -> None:
    frequencies, _ = rope_frequencies(16, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(q_position: int, k_position: int) -> float:
        at_q, at_k = (
            Rotation.at(torch.tensor([[p]]), frequencies, 1.0, torch.float64)
            for p in (q_position, k_position)
        )
        turned_q, _ = rotate(q, q, at_q.cos, at_q.sin)
        _, turned_k = rotate(k, k, at_k.cos, at_k.sin)
        return (turned_q * turned_k).sum().item()

    assert math.isclose(score(7, 3), score(1007, 1003), rel_tol=1e-9)


def test_angles_stay_in_fp32_for_bf16_models() -> None:
    frequencies, _ = rope_frequencies(8, 10000.0)
    rotation = Rotation.at(torch.tensor([[1001]]), frequencies, 1.0, torch.bfloat16)
    assert rotation.cos.dtype == torch.float32
    ones = torch.ones(1, 1, 1, 8, dtype=torch.bfloat16)
    assert rotate(ones, ones, rotation.cos, rotation.sin)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", [None, LinearRopeScaling(factor=3.0)])
def test_dims_beyond_the_turned_ones_stay(scaling: LinearRopeScaling | None) -> None:
    frequencies, factor = rope_frequencies(16, 500.0, scaling, 6)
    alone, _ = rope_frequencies(6, 500.0, scaling)
    assert factor == 1.0
    assert frequencies[:3].equal(alone)
    assert frequencies[3:].tolist() == [0.0] * 5
    rotation = Rotation.at(torch.arange(9)[None], frequencies, factor, torch.float32)
    q, k = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 1, 16)
    turned, _ = rotate(q, k, rotation.cos, rotation.sin)
    still = [3, 4, 5, 6, 7, 11, 12, 13, 14, 15]
    assert turned[..., still].equal(q[..., still])
