"""Norms by layer, from the squares by row of the parameter table that every engine sums anyway.

layers = layers_of(config.model)
layer_norms(layers, result.gradient_squares.tolist())   # {"embed": 0.1, "0": 0.4, "head": 0.2}
"""

import math
from collections.abc import Iterable, Sequence

from llmtrain.config.model import ModelConfig
from llmtrain.model.parameters import parameter_table

EMBEDDING, HEAD = "embed", "head"
"""Layers that are no block: the input embedding; the final norm and the output head."""


def layers_of(model: ModelConfig) -> tuple[str, ...]:
    """Name the layer of every stored parameter, in table order: ``embed``, ``0``, ..., ``head``."""
    names = (info.name for info in parameter_table(model) if info.tied_to is None)
    return tuple(_layer(name) for name in names)


def layer_norms(layers: Sequence[str], squares: Iterable[float]) -> dict[str, float | None]:
    """L2 norm by layer, the head last; null where it is not finite."""
    sums: dict[str, float] = {}
    for layer, square in zip(layers, squares, strict=True):
        sums[layer] = sums.get(layer, 0.0) + square
    sums[HEAD] = sums.pop(HEAD)
    return {
        layer: math.sqrt(total) if math.isfinite(total) else None for layer, total in sums.items()
    }


def _layer(name: str) -> str:
    if name.startswith("model.layers."):
        return name.split(".")[2]
    return EMBEDDING if "embed_tokens" in name else HEAD
