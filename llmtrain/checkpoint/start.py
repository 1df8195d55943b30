"""Start a run with the weights of a checkpoint: of an import, or of another run.

Step, data, optimizer state and journal are those of a new run. Only the model's weights are read,
whatever layout and engine wrote them, and every one has to be there. An adapter of the run starts
fresh beside the weights of a checkpoint that has none.

    carried = start_from("runs/llama", engine, config.model)     # on every rank
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.objects import from_first_rank, one_process_is_fine
from llmtrain.checkpoint.restore import MODEL_PREFIX, Stateful
from llmtrain.checkpoint.weights import StoredWeights
from llmtrain.config.adapter import AdapterConfig
from llmtrain.config.model import ModelConfig
from llmtrain.engine.portion import opened
from llmtrain.errors import CheckpointError
from llmtrain.model.adapter import LORA_A, is_adapter
from llmtrain.model.parameters import parameter_table

logger = logging.getLogger(__name__)

ORIGIN = "huggingface"
"""What an import leaves in ``meta.json`` and ``run.json`` for the export of what comes of it."""
ADAPTER = "adapter"
"""What checkpoints carry of an adapter: the fields of its scale, which no tensor shows."""


def start_from(where: str, engine: Stateful, model: ModelConfig) -> Mapping[str, Any]:
    """Fill ``engine`` from the newest good checkpoint of a run folder, or from a checkpoint folder.

    Returns what the checkpoint carries. Raises CheckpointError on every rank alike: there is none,
    it is damaged or of another model.
    """
    found = from_first_rank(lambda: archive.locate(Path(where)))
    shapes = StoredWeights(found.path).shapes
    check_adapter(found.path, shapes, model)
    carried: Mapping[str, Any] = found.meta.get("carried", {})
    check_scale(found.path, carried, model)
    fresh = model.adapter is not None and not any(map(is_adapter, shapes))
    check_weights(found.path, shapes, replace(model, adapter=None) if fresh else model)
    state = opened(engine.state_dict())
    weights = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(MODEL_PREFIX) and not (fresh and is_adapter(name))
    }
    with one_process_is_fine():
        try:
            reader = FileSystemReader(found.path)
            load(weights, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{found.path} cannot be read: {error}") from error
    engine.load_state_dict(state)
    logger.info("started with the weights of %s", found.path)
    return carried


def check_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Compare a checkpoint's adapter with that of ``model``; having none is fine.

    Raises:
        CheckpointError: the model has no adapter, or one of another rank.
    """
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(LORA_A)}
    wanted = set() if model.adapter is None else {model.adapter.rank}
    if ranks and ranks != wanted:
        own = "null" if model.adapter is None else f"an adapter of rank {model.adapter.rank}"
        raise CheckpointError(
            f"{path} holds an adapter of rank {max(ranks)}, the configuration has model.adapter="
            f"{own}; use the model.adapter the checkpoint was made with, or start from its merged "
            "export (llmtrain export, then llmtrain import)"
        )


def adapter_facts(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """Name what checkpoints of ``model`` carry of its adapter; nothing where it has none."""
    adapter = model.adapter
    if adapter is None:
        return {}
    return {ADAPTER: {"alpha": adapter.alpha, "use_rslora": adapter.use_rslora}}


def check_scale(path: Path, carried: Mapping[str, Any], model: ModelConfig) -> None:
    """Compare what a checkpoint carries of its adapter's scale with the adapter of ``model``.

    Raises:
        CheckpointError: the adapter would be multiplied by another number than it was.
    """
    if model.adapter is None or ADAPTER not in carried:
        return
    own = model.adapter
    was = replace(own, **carried[ADAPTER])
    if not math.isclose(was.scale, own.scale):
        raise CheckpointError(
            f"{path} holds an adapter of {_scale(was)}, the configuration has {_scale(own)}: B A x "
            "would count otherwise than it was trained; use the model.adapter the checkpoint was "
            "made with"
        )


def _scale(adapter: AdapterConfig) -> str:
    rslora = str(adapter.use_rslora).lower()
    return f"alpha={adapter.alpha:g} and use_rslora={rslora} (scale {adapter.scale:g})"


def check_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig) -> None:
    """Compare the weights of a checkpoint with those of ``model``.

    Raises:
        CheckpointError: one is missing, one too many, or of another shape.
    """
    wanted = {info.name: info.shape for info in parameter_table(model) if info.tied_to is None}
    names = [*wanted, *(name for name in shapes if name not in wanted)]
    differing = [name for name in names if shapes.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} is of another model: {len(differing)} weights differ, the first is {name}, of "
            f"shape {shapes.get(name)} in the checkpoint and {wanted.get(name)} in the "
            "configuration; use the model.* the checkpoint was made with"
        )
