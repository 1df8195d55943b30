"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Names and shapes are ours under ``base_model.model.``; the rows of B follow the rows of the matrix
it stands beside, which a family may keep in another order (layout.py).

Invariant: nothing in an ``adapter_config.json`` is passed over in silence. A field is translated,
or is known to have no effect on what the adapter computes, or one sentence refuses it by name.

    found = open_adapter(Path("lora"), model, family)
    found.config, found.weights(torch.float32)
    write_adapter(StoredWeights(checkpoint), model, family, Path("out"), dtype=torch.float32)
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint.weights import NewWeight
from llmtrain.config.adapter import TARGETS, AdapterConfig
from llmtrain.config.model import ModelConfig
from llmtrain.config.strict import show
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.interop.families import Family
from llmtrain.interop.huggingface import write_json
from llmtrain.interop.layout import Place, layout_of
from llmtrain.interop.merged import Source, put_together
from llmtrain.interop.safetensors import SINGLE, TensorFolder, read_json
from llmtrain.interop.shards import ShardWriter
from llmtrain.model.adapter import LORA_B, base_name, is_adapter
from llmtrain.model.parameters import parameter_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TARGET = re.compile(rf"model\.layers\.\d+\.\w+\.({'|'.join(TARGETS)})\.lora_[AB]\.weight")
_TRANSLATED = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights"}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version",
    "revision", "task_type",
    # of methods that other fields, which are refused, switch on
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Starting values that leave the base as it is: whose adapter needs no other base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """An adapter whose config is understood and whose matrices are all there."""

    config: AdapterConfig
    """The adapter."""
    model: ModelConfig
    """The model it belongs to, with it."""
    places: Mapping[str, Place]
    """Where the matrices of the model stand in a Hugging Face checkpoint."""
    tensors: TensorFolder
    """Its matrices."""

    def weights(self, dtype: torch.dtype | None) -> Iterator[NewWeight]:
        """List the adapter's parameters, read as they are written; null keeps their types."""
        for info in parameter_table(self.model):
            if is_adapter(info.name):
                kept = dtype or self.tensors.tensors[_PREFIX + info.name].dtype
                yield NewWeight(
                    name=info.name, shape=info.shape, dtype=kept, whole=True,
                    rows=partial(self._rows, info.name, kept),
                )  # fmt: skip

    def _rows(self, name: str, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        stored = self.tensors.tensors[_PREFIX + name]
        found = self.tensors.rows(_PREFIX + name, 0, stored.shape[0])
        order = self.places[base_name(name)].order
        if order is not None and name.endswith(LORA_B):
            found = found[torch.tensor(order)]
        return found[start:stop].to(dtype)


def open_adapter(path: Path, model: ModelConfig, family: Family) -> AdapterFolder:
    """Understand a PEFT folder of a LoRA of ``model`` and check that it is whole.

    Raises:
        ConfigError: it is no plain LoRA of the matrices of the blocks.
        CheckpointError: matrices are missing, too many, or of another shape.
    """
    fields = read_json(path / CONFIG)
    _check_fields(path, fields)
    tensors = TensorFolder(path, WEIGHTS)
    there = {name.removeprefix(_PREFIX): t.shape for name, t in tensors.tensors.items()}
    targets = {found[1] for name in there if (found := _TARGET.fullmatch(name))}
    config = AdapterConfig(
        rank=int(fields["r"]), alpha=float(fields.get("lora_alpha", 8)),
        use_rslora=bool(fields.get("use_rslora", False)),
        targets=tuple(name for name in TARGETS if name in targets) or TARGETS,
    )  # fmt: skip
    whole = replace(model, adapter=config)
    wanted = {p.name: p.shape for p in parameter_table(whole) if is_adapter(p.name)}
    differing = sorted(n for n in {*wanted, *there} if wanted.get(n) != there.get(n))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path / WEIGHTS} is no adapter of this model: {len(differing)} matrices differ, the "
            f"first is {name}, of shape {there.get(name)} there, expected {wanted.get(name)}; "
            "adapters are for the same matrices of every block, and of the base model's sizes"
        )
    places = _places(model, family, config)
    return AdapterFolder(config=config, model=whole, places=places, tensors=tensors)


def _check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA, by name, all at once."""
    problems = []
    if fields.get("peft_type") != "LORA":
        problems.append(f"peft_type={show(fields.get('peft_type'))}, expected LORA")
    if type(fields.get("r")) is not int:
        problems.append(f"r={show(fields.get('r'))}, expected a whole number")
    if type(fields.get("lora_alpha", 8)) not in (int, float):
        problems.append(f"lora_alpha={show(fields['lora_alpha'])}, expected a number")
    if type(fields.get("use_rslora", False)) is not bool:
        problems.append(f"use_rslora={show(fields['use_rslora'])}, expected true or false")
    if fields.get("init_lora_weights", True) not in _STARTS:
        problems.append(
            f"init_lora_weights={show(fields['init_lora_weights'])}, which changes the base: save "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )
    for name in sorted(set(fields) - _TRANSLATED - _WITHOUT_EFFECT):
        if not _is_off(fields[name]) and (name, fields[name]) != ("bias", "none"):
            problems.append(f"{name}={show(fields[name])}, which this model cannot follow")
    if problems:
        raise ConfigError([f"{path / CONFIG} has {problem}" for problem in problems])


def _is_off(value: Any) -> bool:
    """Whether a field asks for nothing; 0 may name a layer."""
    return value is None or value is False or value in ("", [], {})


def _places(model: ModelConfig, family: Family, adapter: AdapterConfig) -> dict[str, Place]:
    """Return where the adapted matrices stand; refuses those that are one with another there."""
    places = layout_of(replace(model, adapter=None), family, model.vocab_size)
    for name, place in places.items():
        target = name.removesuffix(".weight").rpartition(".")[2]
        if target in adapter.targets and place.name != name:
            raise ConfigError(
                f"an adapter of {target} alone cannot be spelled for {family.model_type}, which "
                f"keeps it in {place.name}; export the merged model (adapter=false), or train an "
                "adapter without gate_proj and up_proj"
            )
    return places


def write_adapter(
    source: Source,
    model: ModelConfig,
    family: Family,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    base: str | None = None,
) -> None:
    """Write the adapter of ``model`` into ``folder`` as PEFT loads it; ``base`` names its model.

    Raises:
        ConfigError: the model has no adapter, or its family keeps adapted matrices together.
    """
    adapter = model.adapter
    if adapter is None:
        raise ConfigError("adapter=true found for a run with model.adapter=null; use adapter=false")
    places = _places(model, family, adapter)
    shapes = {p.name: p.shape for p in parameter_table(model) if is_adapter(p.name)}
    layouts = {
        _PREFIX + name: (dtype or source.dtypes[name], shape) for name, shape in shapes.items()
    }
    with ShardWriter(folder, layouts, max_shard_bytes=1 << 62) as file:
        for name, shape in shapes.items():
            order = places[base_name(name)].order if name.endswith(LORA_B) else None
            rows = range(shape[0]) if order is None else order
            file.put(_PREFIX + name, rows, put_together(source, name))
    (folder / SINGLE).rename(folder / WEIGHTS)
    write_json(folder / CONFIG, _fields(adapter, base))


def _fields(adapter: AdapterConfig, base: str | None) -> dict[str, Any]:
    """Spell the adapter for PEFT."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.use_rslora,
        "target_modules": list(adapter.targets), "bias": "none", "lora_dropout": 0.0,
        "inference_mode": True, "fan_in_fan_out": False,
    }  # fmt: skip
