"""The optimizer of a run, made from the parameter table: matrices decay, norms and biases do not.

Hyper-parameters live here and in the configuration only, never in a checkpoint. Every optimizer
takes ``found_inf`` and ``grad_scale`` on the device (docs/decisions/gated-update.md) and counts its
updates per parameter in ``state[parameter]["step"]``; other states have the parameter's shape.

    factory = optimizer_factory(OptimizerConfig(lr=1e-3))
    optimizer = factory([(info, parameter), ...], matrix_map(owned, world))
    # the engine sets group["lr"] before each step
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.engine.protocol import OptimizerFactory
from llmtrain.errors import ConfigError
from llmtrain.model.parameters import ParameterInfo
from llmtrain.parallel.matrices import MatrixMap
from llmtrain.train.lion import Lion
from llmtrain.train.muon import Muon

NamedParameters = Sequence[tuple[ParameterInfo, nn.Parameter]]
"""Rows of the parameter table with the (possibly sharded) parameters they stand for."""

EPS = 1e-8
"""Added to the root of AdamW's second moment where ``optimizer.eps`` names nothing."""


def adamw(
    config: OptimizerConfig, parameters: NamedParameters, matrix_map: MatrixMap
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), fused: it takes ``found_inf`` on the device to skip an update."""
    del matrix_map
    return torch.optim.AdamW(
        parameter_groups(config, parameters),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=EPS if config.eps is None else config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def lion(
    config: OptimizerConfig, parameters: NamedParameters, matrix_map: MatrixMap
) -> torch.optim.Optimizer:
    """Lion (arXiv:2302.06675)."""
    del matrix_map
    groups = parameter_groups(config, parameters)
    return Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def muon(
    config: OptimizerConfig, parameters: NamedParameters, matrix_map: MatrixMap
) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks, AdamW for embedding, head, norms and biases."""
    trained = _trainable(parameters)
    matrices = [(info, p) for info, p in trained if is_block_matrix(info)]
    others = [(info, p) for info, p in trained if not is_block_matrix(info)]
    rest = adamw(config, others, matrix_map) if others else None
    return Muon(matrices, rest, matrix_map, config)


OPTIMIZERS: dict[
    str, Callable[[OptimizerConfig, NamedParameters, MatrixMap], torch.optim.Optimizer]
] = {"adamw": adamw, "muon": muon, "lion": lion}
"""Update rules by ``optimizer.kind``."""


def optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Give the factory of ``optimizer.kind``; raises ConfigError for a kind not in the map."""
    if config.kind not in OPTIMIZERS:
        raise ConfigError(f"optimizer.kind={config.kind} is not one of {sorted(OPTIMIZERS)}")
    make = OPTIMIZERS[config.kind]
    return lambda parameters, matrix_map: make(config, parameters, matrix_map)


def is_block_matrix(info: ParameterInfo) -> bool:
    """Tell whether a parameter is a matrix of a block: what Muon updates."""
    return len(info.shape) == 2 and ".layers." in info.name


def parameter_groups(config: OptimizerConfig, parameters: NamedParameters) -> list[dict[str, Any]]:
    """Split trainable parameters into a decaying and a non-decaying group, in table order.

    A tied parameter appears once, under the name it is tied to; an empty group is left out.
    """
    trained = _trainable(parameters)
    groups = [
        {"params": [p for info, p in trained if info.decay], "weight_decay": config.weight_decay},
        {"params": [p for info, p in trained if not info.decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trainable(parameters: NamedParameters) -> list[tuple[ParameterInfo, nn.Parameter]]:
    return [(info, p) for info, p in parameters if info.trainable and info.tied_to is None]
