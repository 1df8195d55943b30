"""Muon against its formulas in fp64, and what Newton-Schulz makes of singular values."""

import math

import pytest
import torch
from torch import Tensor

from llmtrain.config.training import OptimizerConfig
from llmtrain.engine.state import gated_step
from llmtrain.model.parameters import ParameterInfo
from llmtrain.optim import muon
from llmtrain.optim.muon import Muon, orthogonalize, orthogonalize_all
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.matrices import run_alone


def reference(matrix: Tensor, steps: int) -> Tensor:
    """The polynomial on the singular values themselves: what the iterations do to a matrix."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("shape", [(20, 28), (28, 20), (9, 9), (1, 7)])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    for steps in (1, 5):
        assert torch.allclose(orthogonalize(matrix, steps), reference(matrix, steps), atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float64, (64, 192)), (torch.float32, (192, 64)), (torch.bfloat16, (64, 192))],
)
def test_newton_schulz_brings_singular_values_near_one(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    result = orthogonalize(random(*shape).to(dtype))
    assert result.dtype == dtype
    values = torch.linalg.svdvals(result.double())
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("limit", [1, 3 * 12 * 20, 1 << 16])
def test_batches_give_what_each_matrix_gives_alone(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched products may add in another order: fp32 agrees to 1e-6 of the largest value, 1."""
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", {"cpu": limit})
    shapes = [(12, 20), (20, 12), (9, 9), (12, 20), (20, 12), (1, 7), (20, 12), (9, 9)]
    sizes: list[int] = []

    def counted(matrices: Tensor, steps: int) -> Tensor:
        sizes.append(len(matrices) if matrices.dim() == 3 else 1)
        return orthogonalize(matrices, steps)

    monkeypatch.setattr(muon, "orthogonalize", counted)
    matrices = [random(*shape, seed=n).float() for n, shape in enumerate(shapes)]
    together = orthogonalize_all(matrices, 5)
    assert sizes == {1: [1] * 8, 720: [3, 2, 2, 1], 1 << 16: [5, 2, 1]}[limit]
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(result, orthogonalize(matrix, 5), rtol=0, atol=1e-6)
        if limit == 1:
            assert torch.equal(result, orthogonalize(matrix, 5))


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(3, 5)).any()


def test_five_steps_are_those_of_the_formulas() -> None:
    shape = (12, 20)
    start = random(*shape)
    parameter = torch.nn.Parameter(start.clone())
    info = ParameterInfo(name="model.layers.0.w", shape=shape, trainable=True, decay=True)
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.3, momentum=0.9)
    optimizer = Muon([(info, parameter)], None, run_alone, config)
    weight, momentum = start.clone(), torch.zeros_like(start)
    for number in range(5):
        gradient = random(*shape, seed=1 + number)
        parameter.grad = gradient.clone()
        optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
        optimizer.step()

        momentum = 0.9 * momentum + gradient / 4.0
        direction = reference(0.9 * momentum + gradient / 4.0, steps=5)
        weight = weight - 0.1 * (0.2 * math.sqrt(20) * direction + 0.3 * weight)
        assert torch.allclose(parameter, weight, rtol=0, atol=1e-11)
        assert torch.allclose(optimizer.state[parameter]["momentum"], momentum, atol=1e-14)


def test_an_update_has_the_size_of_one_of_adamw() -> None:
    shape = (32, 64)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    info = ParameterInfo(name="model.layers.0.w", shape=shape, trainable=True, decay=True)
    config = OptimizerConfig(kind="muon", lr=1.0, muon_dtype="bf16", newton_schulz_steps=6)
    optimizer = Muon([(info, parameter)], None, run_alone, config)
    parameter.grad = random(*shape).float()
    optimizer.step()
    assert parameter.dtype == torch.float32
    assert 0.15 < parameter.square().mean().sqrt().item() < 0.25


def test_a_stage_without_blocks_has_no_matrix_to_update() -> None:
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    info = ParameterInfo(name="lm_head.weight", shape=(6, 4), trainable=True, decay=True)
    optimizer = optimizer_factory(OptimizerConfig(kind="muon"))([(info, parameter)], run_alone)
    parameter.grad = random(6, 4).float()
    gated_step(optimizer, skip=torch.zeros(()), divisor=None)
    assert parameter.all()
