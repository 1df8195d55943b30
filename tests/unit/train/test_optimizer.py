"""Which parameters decay, and that an update can be skipped on the device."""

import pytest
import torch
from torch import nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.errors import ConfigError
from llmtrain.model.parameters import ParameterInfo
from llmtrain.train.optimizer import optimizer_factory


def row(
    name: str, *shape: int, trainable: bool = True, tied_to: str | None = None
) -> tuple[ParameterInfo, nn.Parameter]:
    info = ParameterInfo(
        name=name, shape=shape, trainable=trainable, decay=len(shape) > 1, tied_to=tied_to
    )
    return info, nn.Parameter(torch.ones(shape))


def test_matrices_decay_and_vectors_do_not() -> None:
    rows = [row("a.weight", 2, 3), row("norm.weight", 3), row("b.weight", 3, 3)]
    optimizer = optimizer_factory(OptimizerConfig(weight_decay=0.3))(rows)
    groups = [(g["weight_decay"], [tuple(p.shape) for p in g["params"]])
              for g in optimizer.param_groups]  # fmt: skip
    assert groups == [(0.3, [(2, 3), (3, 3)]), (0.0, [(3,)])]


def test_frozen_and_tied_parameters_are_left_out() -> None:
    rows = [
        row("a.weight", 2, 3),
        row("frozen.weight", 2, 2, trainable=False),
        row("lm_head.weight", 2, 3, tied_to="a.weight"),
    ]
    groups = optimizer_factory(OptimizerConfig())(rows).param_groups
    assert [len(group["params"]) for group in groups] == [1]


def test_hyper_parameters_reach_the_optimizer() -> None:
    config = OptimizerConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3)
    group = optimizer_factory(config)([row("a.weight", 2, 2)]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_update_changes_neither_parameter_nor_step(dtype: torch.dtype) -> None:
    info, _ = row("a.weight", 2, 2)
    parameter = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = optimizer_factory(OptimizerConfig(lr=0.1))([(info, parameter)])
    seen = []
    for skip in (0.0, 1.0, 0.0):
        parameter.grad = torch.ones_like(parameter)
        optimizer.found_inf = torch.tensor(skip)  # type: ignore[attr-defined]
        optimizer.step()
        seen.append((parameter[0, 0].item(), optimizer.state[parameter]["step"].item()))
    assert seen[0] == seen[1]
    assert seen[2][1] == 2
    assert seen[2][0] < seen[1][0]


def test_an_unknown_kind_lists_the_known_ones() -> None:
    config = OptimizerConfig(kind="lion")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"optimizer\.kind=lion is not one of \['adamw'\]"):
        optimizer_factory(config)
