"""AdamW over bf16 against torch's in fp32, and the same bits however parameters are cut."""

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.model.parameters import ParameterInfo
from llmtrain.optim import adamw
from llmtrain.optim.adamw import AdamW
from llmtrain.optim.optimizer import optimizer_factory
from llmtrain.parallel.matrices import run_alone
from llmtrain.parallel.region import Region, whole

SHAPE = (12, 20)
INFO = ParameterInfo(name="model.layers.0.w", shape=SHAPE, trainable=True, decay=True)


def random(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def make(
    dtype: torch.dtype, state_dtype: str, region: Region | None = None, **fields: float
) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    cut = whole(SHAPE) if region is None else region
    parameter = nn.Parameter(random(0)[cut].to(dtype).contiguous())
    parameter.grad_dtype = torch.float32
    config = OptimizerConfig(lr=0.05, state_dtype=state_dtype, **fields)  # type: ignore[arg-type]
    made = optimizer_factory(config, seed=3)([(INFO, parameter)], run_alone, [cut])
    return made, parameter


def trained(made: torch.optim.Optimizer, parameter: nn.Parameter, cut: Region) -> list[Tensor]:
    """Parameter and moments after five steps, the third of them skipped."""
    for step in range(5):
        parameter.grad = random(1 + step)[cut].contiguous()
        made.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
        made.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
        made.step()
    state = made.state[parameter]
    assert state["step"].item() == 4
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


def test_in_fp32_it_is_torchs() -> None:
    fused, reference = make(torch.float32, "fp32", beta2=0.9)
    assert type(fused) is torch.optim.AdamW
    assert fused.defaults["fused"]
    place = adamw.Place(1, whole(SHAPE), SHAPE)
    parameter = nn.Parameter(random(0))
    own = AdamW(
        [{"params": [parameter], "weight_decay": 0.1}], 0.05, (0.9, 0.9), 1e-8,
        state_dtype=torch.float32, places={parameter: place},
    )  # fmt: skip
    pairs = zip(
        trained(own, parameter, whole(SHAPE)), trained(fused, reference, whole(SHAPE)), strict=True
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_each_write_is_within_a_spacing_of_fp32(dtype: torch.dtype, state_dtype: str) -> None:
    """A rounding moves a value by less than a spacing of bf16: 2^-7 of it at most.

    Four updates round moments four times; weights, all below 4, by spacings of 2^-6 at most.
    """
    exact = trained(*make(torch.float32, "fp32"), whole(SHAPE))
    found = trained(*make(dtype, state_dtype), whole(SHAPE))
    kept = torch.bfloat16 if state_dtype == "bf16" else torch.float32
    assert [t.dtype for t in found] == [dtype, kept, kept]
    for mine, theirs in zip(found[1:], exact[1:], strict=True):
        assert ((mine.float() - theirs).norm() / theirs.norm()).item() < 2.0**-6
    assert ((found[0].float() - exact[0]).abs().max()).item() < 4 * 2.0**-6


CUTS = [
    [(slice(0, 5), slice(0, 20)), (slice(5, 12), slice(0, 20))],
    [(slice(0, 12), slice(0, 7)), (slice(0, 12), slice(7, 20))],
    [(slice(0, 12), slice(0, 20)), (slice(12, 12), slice(0, 20))],
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_have_the_bits_of_the_whole(
    cut: list[Region], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trained(*make(dtype, "bf16"), whole(SHAPE))
    monkeypatch.setattr(adamw, "_PIECE", {"cpu": 9})
    for region in cut:
        for mine, theirs in zip(
            trained(*make(dtype, "bf16", region), region), together, strict=True
        ):
            assert torch.equal(mine, theirs[region])


def test_what_falls_by_less_than_a_spacing_falls_as_in_fp32() -> None:
    """Plain rounding never moves a second moment by a thousandth of itself, nor such a weight."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    info = ParameterInfo(name="w", shape=(64, 64), trainable=True, decay=True)
    config = OptimizerConfig(lr=0.01, beta2=0.999, state_dtype="bf16", weight_decay=0.1)
    made = optimizer_factory(config, seed=3)([(info, parameter)], run_alone, [whole((64, 64))])
    for step in range(200):
        parameter.grad = torch.full((64, 64), float(step == 0))
        made.step()
        if step == 0:
            with torch.no_grad():
                parameter.fill_(1.0)
                made.state[parameter]["exp_avg"].zero_()
    moment = made.state[parameter]["exp_avg_sq"].double().mean().item()
    assert moment == pytest.approx(0.001 * 0.999**199, rel=2e-3)
    assert parameter.double().mean().item() == pytest.approx(0.999**199, rel=2e-3)


def test_another_seed_rounds_otherwise() -> None:
    found = []
    for seed in (3, 4):
        parameter = nn.Parameter(random(0).bfloat16())
        parameter.grad_dtype = torch.float32
        factory = optimizer_factory(OptimizerConfig(lr=0.05), seed)
        made = factory([(INFO, parameter)], run_alone, [whole(SHAPE)])
        found.append(trained(made, parameter, whole(SHAPE))[0])
    assert not torch.equal(*found)


def test_a_tensor_that_is_not_its_region_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(5, 20, dtype=torch.bfloat16))
    factory = optimizer_factory(OptimizerConfig(), seed=3)
    with pytest.raises(ValueError, match=r"model.layers.0.w: a tensor of shape \(5, 20\) cannot"):
        factory([(INFO, parameter)], run_alone, [whole(SHAPE)])
