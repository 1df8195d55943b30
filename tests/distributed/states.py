"""Bodies that ranks run in the tests of saved states."""

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llmtrain.config.run import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.parallel.place import Place
from tests.distributed.rig import Rig, rig

TRAINED = 2
NEXT = range(TRAINED, TRAINED + 5)


def save(place: Place, config: RunConfig, folder: str) -> list[float]:
    """Train two steps, save, and return the next losses."""
    with rig(place, config) as r:
        r.train(range(TRAINED))
        dcp.save(r.engine.state_dict(), checkpoint_id=folder)
        return r.train(NEXT)


def load(place: Place, config: RunConfig, folder: str, again: str | None = None) -> list[float]:
    """Load what ``save`` wrote, save it ``again``, and return the next losses."""
    with rig(place, config) as r:
        restore(r, folder)
        if again is not None:
            dcp.save(r.engine.state_dict(), checkpoint_id=again)
        return r.train(NEXT)


def restore(r: Rig, folder: str) -> None:
    state = r.engine.state_dict()
    dcp.load(state, checkpoint_id=folder)
    r.engine.load_state_dict(state)


def load_incomplete(place: Place, config: RunConfig) -> str:
    """The message about a state that lacks a tensor."""
    with rig(place, config) as r:
        state = {k: v for k, v in r.engine.state_dict().items() if k != "model.model.norm.weight"}
        try:
            r.engine.load_state_dict(state)
        except CheckpointError as error:
            return str(error)
    return "loaded"


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a saved state, whole."""
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # here is no process group, and none is needed
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state
