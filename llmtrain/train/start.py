"""Start a run with the weights of a checkpoint: of an import, or of another run.

Step, data, optimizer state and journal are those of a new run. Only the model's weights are read,
whatever layout and engine wrote them, and every one has to be there.

    carried = start_from("runs/llama", engine, config.model)     # on every rank
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.config.model import ModelConfig
from llmtrain.errors import CheckpointError
from llmtrain.model.parameters import parameter_table
from llmtrain.train import archive
from llmtrain.train.checkpoint import MODEL_PREFIX, Stateful
from llmtrain.train.objects import from_first_rank, one_process_is_fine
from llmtrain.train.weights import StoredWeights

logger = logging.getLogger(__name__)

ORIGIN = "huggingface"
"""What an import leaves in ``meta.json`` and ``run.json`` for the export of what comes of it."""


def start_from(where: str, engine: Stateful, model: ModelConfig) -> Mapping[str, Any]:
    """Fill ``engine`` from the newest good checkpoint of a run folder, or from a checkpoint folder.

    Returns what the checkpoint carries. Raises CheckpointError on every rank alike: there is none,
    it is damaged or of another model.
    """
    found = from_first_rank(lambda: archive.locate(Path(where)))
    check_weights(found.path, StoredWeights(found.path).shapes, model)
    state = engine.state_dict()
    weights = {name: tensor for name, tensor in state.items() if name.startswith(MODEL_PREFIX)}
    with one_process_is_fine():
        try:
            reader = FileSystemReader(found.path)
            load(weights, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{found.path} cannot be read: {error}") from error
    engine.load_state_dict(state)
    logger.info("started with the weights of %s", found.path)
    carried: Mapping[str, Any] = found.meta.get("carried", {})
    return carried


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
