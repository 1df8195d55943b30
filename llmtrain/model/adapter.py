"""Low-rank adapters in a model (LoRA, arXiv:2106.09685).

Invariant: an adapted matrix keeps its name and gets two beside it, ``NAME.lora_A.weight`` [r, I]
and ``NAME.lora_B.weight`` [O, r]; all that is no adapter is frozen. B starts at zero, so a model
with a fresh adapter computes what it computes without one.

    insert_adapter(transformer, config.adapter)    # Transformer does it itself
    base_name("model.layers.0.mlp.up_proj.lora_A.weight")    # model.layers.0.mlp.up_proj.weight
"""

from torch import nn

from llmtrain.config.adapter import AdapterConfig
from llmtrain.model.layers import Linear

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""How the names of an adapter's matrices end."""


def insert_adapter(blocks: nn.Module, adapter: AdapterConfig) -> None:
    """Give the matrices of ``blocks`` that ``adapter`` targets their A and B."""
    for name, module in list(blocks.named_modules()):
        if isinstance(module, Linear) and name.rpartition(".")[2] in adapter.targets:
            module.adapt(adapter.rank, adapter.scale)


def freeze_base(model: nn.Module) -> None:
    """Leave only adapters trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is a matrix of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def base_name(name: str) -> str:
    """Name the matrix that the adapter's matrix ``name`` stands beside."""
    return name.removesuffix(LORA_A).removesuffix(LORA_B) + ".weight"
