"""The optimizer of a run, made from the parameter table: matrices decay, norms and biases do not.

Hyper-parameters live here and in the configuration only, never in a checkpoint. Every optimizer
takes ``found_inf`` and ``grad_scale`` on the device (docs/decisions/gated-update.md) and counts its
updates per parameter in ``state[parameter]["step"]``; other states have the parameter's shape.

    factory = optimizer_factory(OptimizerConfig(lr=1e-3), seed=0)
    optimizer = factory([(info, parameter), ...], matrix_map(owned, world), regions)
    set_learning_rate(optimizer, lr=1e-3)    # the engine, before each step (engine/step.py)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmtrain.config.training import OptimizerConfig
from llmtrain.engine.protocol import LR_MULTIPLIER, OptimizerFactory
from llmtrain.errors import ConfigError
from llmtrain.model.parameters import ParameterInfo
from llmtrain.optim.adamw import AdamW, Place
from llmtrain.optim.lion import Lion
from llmtrain.optim.muon import Muon
from llmtrain.optim.rounding import rounding_key
from llmtrain.parallel.matrices import MatrixMap
from llmtrain.parallel.region import Region, sizes

NamedParameters = Sequence[tuple[ParameterInfo, nn.Parameter]]
"""Rows of the parameter table with the (possibly sharded) parameters they stand for."""

EPS = 1e-8
"""Added to the root of AdamW's second moment where ``optimizer.eps`` names nothing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What an update rule needs beside the parameters."""

    config: OptimizerConfig
    """Kind, rates, moments."""
    matrix_map: MatrixMap
    """Applies functions to whole matrices."""
    seed: int
    """Run seed: stochastic rounding derives from it."""
    regions: Mapping[str, Region] | None
    """Where the tensors lie in the whole parameters, by name.

    None where the engine updates other tensors than it names, as DeepSpeed its fp32 partitions.
    """


def adamw(setting: Setting, parameters: NamedParameters) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101): torch's fused one, or our own where anything is kept in bf16.

    Both take ``found_inf`` on the device to skip an update.
    """
    config = setting.config
    groups = parameter_groups(config, parameters)
    betas, eps = (config.beta1, config.beta2), EPS if config.eps is None else config.eps
    regions = setting.regions
    in_bf16 = config.state_dtype == "bf16" or any(p.dtype == torch.bfloat16 for _, p in parameters)
    if regions is None or not in_bf16:
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=eps, fused=True)
    return AdamW(
        groups,
        lr=config.lr,
        betas=betas,
        eps=eps,
        state_dtype=torch.bfloat16 if config.state_dtype == "bf16" else torch.float32,
        places={p: _place(setting.seed, info, p, regions[info.name]) for info, p in parameters},
    )


def _place(seed: int, info: ParameterInfo, parameter: nn.Parameter, region: Region) -> Place:
    """Say where a tensor draws its roundings."""
    if sizes(region) != tuple(parameter.shape):
        raise ValueError(
            f"{info.name}: a tensor of shape {tuple(parameter.shape)} cannot be the region "
            f"{region} of {info.shape}"
        )
    return Place(rounding_key(seed, info.name), region, info.shape)


def lion(setting: Setting, parameters: NamedParameters) -> torch.optim.Optimizer:
    """Lion (arXiv:2302.06675)."""
    config = setting.config
    groups = parameter_groups(config, parameters)
    return Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))


def muon(setting: Setting, parameters: NamedParameters) -> torch.optim.Optimizer:
    """Muon for the matrices of the blocks, AdamW for embedding, head, norms and biases."""
    trained = _trainable(parameters)
    matrices = [(info, p) for info, p in trained if is_block_matrix(info)]
    others = [(info, p) for info, p in trained if not is_block_matrix(info)]
    rest = adamw(setting, others) if others else None
    return Muon(matrices, rest, setting.matrix_map, setting.config)


OPTIMIZERS: dict[str, Callable[[Setting, NamedParameters], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
    "lion": lion,
}
"""Update rules by ``optimizer.kind``."""


def optimizer_factory(config: OptimizerConfig, seed: int = 0) -> OptimizerFactory:
    """Give the factory of ``optimizer.kind``; raises ConfigError for a kind not in the map.

    ``seed`` is the run's; stochastic rounding alone draws from it.
    """
    if config.kind not in OPTIMIZERS:
        raise ConfigError(f"optimizer.kind={config.kind} is not one of {sorted(OPTIMIZERS)}")
    make = OPTIMIZERS[config.kind]

    def factory(
        parameters: NamedParameters, matrix_map: MatrixMap, regions: Sequence[Region] | None = None
    ) -> torch.optim.Optimizer:
        held = None
        if regions is not None:
            rows = zip(parameters, regions, strict=True)
            held = {info.name: region for (info, _), region in rows}
        return make(Setting(config, matrix_map, seed, held), parameters)

    return factory


def is_block_matrix(info: ParameterInfo) -> bool:
    """Tell whether a parameter is a matrix of a block: what Muon updates."""
    return len(info.shape) == 2 and ".layers." in info.name


def parameter_groups(config: OptimizerConfig, parameters: NamedParameters) -> list[dict[str, Any]]:
    """Split trainable parameters into decaying groups and one that does not, in table order.

    A tied parameter appears once, under the name it is tied to; an empty group is left out. Under
    muP (model/mup.py) the matrices of the blocks are a group of their own: their rate falls with
    the width, and what a step decays, rate times ``weight_decay``, stays.
    """
    trained = _trainable(parameters)
    widths = dict.fromkeys(info.width_multiplier for info, _ in trained if info.decay)
    groups = [
        {
            "params": [p for info, p in trained if info.decay and info.width_multiplier == width],
            "weight_decay": config.weight_decay * width,
            LR_MULTIPLIER: 1.0 / width,
        }
        for width in widths
    ]
    rest = [p for info, p in trained if not info.decay]
    groups.append({"params": rest, "weight_decay": 0.0, LR_MULTIPLIER: 1.0})
    return [group for group in groups if group["params"]]


def _trainable(parameters: NamedParameters) -> list[tuple[ParameterInfo, nn.Parameter]]:
    return [(info, p) for info, p in parameters if info.trainable and info.tied_to is None]
