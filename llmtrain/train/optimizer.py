"""The update rule, made from the parameter table: matrices decay, norms and biases do not.

Hyper-parameters live here and in the configuration only, never in a checkpoint.

    factory = optimizer_factory(OptimizerConfig(lr=1e-3))
    optimizer = factory([(info, parameter), ...])  # the engine sets group["lr"] before each step
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.engine.protocol import OptimizerFactory
from llmtrain.errors import ConfigError
from llmtrain.model.parameters import ParameterInfo

NamedParameters = Sequence[tuple[ParameterInfo, nn.Parameter]]
"""Rows of the parameter table with the (possibly sharded) parameters they stand for."""


def adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), fused: it takes ``found_inf`` on the device to skip an update."""
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": adamw
}
"""Update rules by ``optimizer.kind``."""


def optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Give the factory of ``optimizer.kind``; raises ConfigError for a kind not in the map."""
    if config.kind not in OPTIMIZERS:
        raise ConfigError(f"optimizer.kind={config.kind} is not one of {sorted(OPTIMIZERS)}")
    make = OPTIMIZERS[config.kind]
    return lambda parameters: make(config, parameter_groups(config, parameters))


def parameter_groups(config: OptimizerConfig, parameters: NamedParameters) -> list[dict[str, Any]]:
    """Split trainable parameters into a decaying and a non-decaying group, in table order.

    A tied parameter appears once, under the name it is tied to; an empty group is left out.
    """
    trainable = [(info, p) for info, p in parameters if info.trainable and info.tied_to is None]
    groups = [
        {"params": [p for info, p in trainable if info.decay], "weight_decay": config.weight_decay},
        {"params": [p for info, p in trainable if not info.decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
