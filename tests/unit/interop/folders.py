"""Small Hugging Face folders, written by the safetensors package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.interop.families import read_config
from llmtrain.interop.layout import layout_of, shapes_there

SIZES: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def config_of(kind: str, **fields: Any) -> dict[str, Any]:
    """A config.json."""
    return {"model_type": kind, **SIZES, "head_dim": 8, **fields}


def weights_of(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random tensors of the shapes a config asks for."""
    family, model = read_config(config)
    shapes = shapes_there(layout_of(model, family, model.vocab_size))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_folder(folder: Path, config: Mapping[str, Any], num_shards: int = 2) -> dict[str, Tensor]:
    """Write a whole folder; returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = weights_of(config)
    names, shard_of = list(weights), {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[number::num_shards]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        shard_of |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": shard_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights
