"""Which parameters get which rule, and that every rule can be skipped on the device."""

import math

import pytest
import torch
from torch import nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.errors import ConfigError
from llmtrain.model.parameters import ParameterInfo
from llmtrain.optim.optimizer import OPTIMIZERS, NamedParameters, optimizer_factory
from llmtrain.parallel.matrices import run_alone

KINDS = sorted(OPTIMIZERS)
MATRIX = "model.layers.0.mlp.up_proj.weight"


def row(
    name: str, *shape: int, trainable: bool = True, tied_to: str | None = None
) -> tuple[ParameterInfo, nn.Parameter]:
    info = ParameterInfo(
        name=name, shape=shape, trainable=trainable, decay=len(shape) > 1, tied_to=tied_to
    )
    return info, nn.Parameter(torch.ones(shape))


def make(rows: NamedParameters, config: OptimizerConfig | None = None) -> torch.optim.Optimizer:
    return optimizer_factory(config or OptimizerConfig())(rows, run_alone)


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_matrices_decay_and_vectors_do_not(kind: str) -> None:
    rows = [row("a.weight", 2, 3), row("norm.weight", 3), row("b.weight", 3, 3)]
    optimizer = make(rows, OptimizerConfig(kind=kind, weight_decay=0.3))
    groups = [(g["weight_decay"], [tuple(p.shape) for p in g["params"]])
              for g in optimizer.param_groups]  # fmt: skip
    assert groups == [(0.3, [(2, 3), (3, 3)]), (0.0, [(3,)])]


def test_muon_takes_the_matrices_of_the_blocks_alone() -> None:
    rows = [
        row("model.embed_tokens.weight", 7, 2),
        row(MATRIX, 2, 3),
        row("model.layers.0.input_layernorm.weight", 2),
        row("lm_head.weight", 7, 3),
    ]
    optimizer = make(rows, OptimizerConfig(kind="muon", weight_decay=0.3))
    step(optimizer, rows, skip=0.0)
    groups = [(g["weight_decay"], [tuple(p.shape) for p in g["params"]])
              for g in optimizer.param_groups]  # fmt: skip
    assert groups == [(0.3, [(2, 3)]), (0.3, [(7, 2), (7, 3)]), (0.0, [(2,)])]
    states = [sorted(optimizer.state[p]) for _, p in rows]
    adamw = ["exp_avg", "exp_avg_sq", "step"]
    assert states == [adamw, ["momentum", "step"], adamw, adamw]


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_tied_parameters_are_left_out(kind: str) -> None:
    rows = [
        row("a.weight", 2, 3),
        row("frozen.layers.weight", 2, 2, trainable=False),
        row("lm_head.weight", 2, 3, tied_to="a.weight"),
    ]
    groups = make(rows, OptimizerConfig(kind=kind)).param_groups
    assert sum(len(group["params"]) for group in groups) == 1


def test_hyper_parameters_reach_the_optimizer() -> None:
    config = OptimizerConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3)
    group = make([row("a.weight", 2, 2)], config).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


def step(
    optimizer: torch.optim.Optimizer, rows: NamedParameters, skip: float, value: float = 1.0
) -> None:
    for _, parameter in rows:
        parameter.grad = torch.full_like(parameter, value)
    optimizer.found_inf = torch.tensor(skip)  # type: ignore[attr-defined]
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.step()


def bits(optimizer: torch.optim.Optimizer, rows: NamedParameters) -> list[bytes]:
    tensors = [t for _, p in rows for t in (p, *optimizer.state[p].values())]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    rows = [row(MATRIX, 3, 2), row("model.norm.weight", 3)]
    for _, parameter in rows:
        parameter.data = torch.linspace(-1, 1, parameter.numel(), dtype=dtype).view_as(parameter)
        parameter.data.view(-1)[0] = -0.0
    optimizer = make(rows, OptimizerConfig(kind=kind, lr=0.1))
    assert getattr(optimizer, "_step_supports_amp_scaling", False), "the engine would refuse it"
    step(optimizer, rows, skip=1.0)
    fresh = bits(optimizer, rows)
    step(optimizer, rows, skip=0.0)
    once = bits(optimizer, rows)
    assert once != fresh
    for value in (math.nan, math.inf, 3.0):
        step(optimizer, rows, skip=1.0, value=value)
        assert bits(optimizer, rows) == once
    assert [optimizer.state[p]["step"].item() for _, p in rows] == [1.0, 1.0]
    step(optimizer, rows, skip=0.0)
    assert [optimizer.state[p]["step"].item() for _, p in rows] == [2.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_divided_in_place_where_the_step_is_applied(kind: str) -> None:
    rows = [row(MATRIX, 3, 2), row("model.norm.weight", 3)]
    optimizer = make(rows, OptimizerConfig(kind=kind))
    for skip, left in ((0.0, 0.5), (1.0, 1.0)):
        step(optimizer, rows, skip=skip)
        assert all(p.grad is not None and (p.grad == left).all() for _, p in rows)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    config = OptimizerConfig(kind="sgd")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"kind=sgd is not one of \['adamw', 'lion', 'muon'\]"):
        optimizer_factory(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "lion", "eps": 1e-6}, "eps=1e-06 has no meaning for kind=lion; use kind=adamw "),
        ({"momentum": 0.9}, "momentum=0.9 has no meaning for kind=adamw; use kind=muon, or mom"),
        ({"kind": "lion", "muon_dtype": "bf16"}, "muon_dtype=bf16 has no meaning for kind=lion"),
        ({"newton_schulz_steps": 5}, "newton_schulz_steps=5 has no meaning for kind=adamw"),
        ({"kind": "muon", "newton_schulz_steps": 0}, "newton_schulz_steps=0 must be at least 1"),
        ({"kind": "muon", "momentum": 1.0}, "momentum=1.0 must be at least 0 and below 1"),
    ],
)
def test_a_field_the_kind_would_ignore_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**fields)  # type: ignore[arg-type]
