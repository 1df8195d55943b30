"""The matrices of a stage whose base is kept in 4 bits (QLoRA, arXiv:2305.14314).

Invariant: a packed matrix keeps its name and shape: its parameter stays on the meta device, as a
label without memory, and the values are in a ``PackedMatrix`` that multiplies in its place.

    packed = pack_blocks(transformer, config.adapter, device)    # before anything has memory
    packed["model.layers.0.mlp.up_proj.weight"].store(weight)
"""

import torch
from torch import nn

from llmtrain.config.adapter import TARGETS, AdapterConfig
from llmtrain.errors import ConfigError
from llmtrain.model.layers import Linear
from llmtrain.model.transformer import Transformer
from llmtrain.ops.nf4 import PackedMatrix, unavailable

Packed = dict[str, PackedMatrix]
"""By the name of the parameter."""


def pack_blocks(
    transformer: Transformer, adapter: AdapterConfig | None, device: torch.device
) -> Packed:
    """Have the blocks multiply by packed matrices where ``adapter`` says so.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if adapter is None or adapter.quantize_base is None:
        return {}
    if (reason := unavailable()) is not None:
        raise ConfigError(
            f"model.adapter.quantize_base={adapter.quantize_base} {reason}; or use null"
        )
    packed: Packed = {}
    for name, module in transformer.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in TARGETS:
            matrix = PackedMatrix(tuple(module.weight.shape), device)
            module.product = matrix.multiply
            packed[f"{name}.weight"] = matrix
    return packed


def give_memory(module: nn.Module, device: torch.device, packed: Packed, prefix: str) -> None:
    """Give every parameter on the meta device memory but those ``packed`` stands for.

    ``prefix`` is what the module puts before their names.
    """
    for path, parameter in list(module.named_parameters()):
        if path.removeprefix(prefix) in packed:
            continue
        owner, _, name = path.rpartition(".")
        empty = torch.empty_like(parameter, device=device)
        filled = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        setattr(module.get_submodule(owner), name, filled)
