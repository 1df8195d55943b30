"""Read a checkpoint: into an engine on all ranks, or as plain tensors in one process.

Invariant: what is loaded fits by name and shape, and belongs to data the run goes on with, or one
sentence says what does not, on every rank alike.

    check_facts(found, facts, journal)
    load_into(engine, found.path)
    weights = load_model_weights(Path("runs/demo"))   # plain fp32 tensors, no process group
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.facts import changed_facts
from llmtrain.checkpoint.objects import gather, one_process_is_fine
from llmtrain.engine.portion import opened
from llmtrain.errors import CheckpointError
from llmtrain.run.journal import RunJournal

MODEL_PREFIX = "model."
"""What stands before a parameter's name in the checkpoint schema."""


class Stateful(Protocol):
    """The part of an engine that checkpoints need.

    It may have ``before_update(act)`` besides: see ``engine.protocol.Engine``.
    """

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors or DTensors by schema name; loaded into in place."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the loaded tensors."""
        ...


def load_into(engine: Stateful, folder: Path) -> None:
    """Load a checkpoint folder into ``engine``; every rank calls it, perhaps with its own folder.

    Raises CheckpointError on every rank alike: of another model, or not to be read.
    """
    state = opened(engine.state_dict())
    check_schema(folder, state)
    with one_process_is_fine():
        try:
            load(state, storage_reader=FileSystemReader(folder), no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{folder} cannot be read: {_cause(error)}") from error
    engine.load_state_dict(state)


def check_facts(
    found: archive.Checkpoint, facts: Mapping[str, str], journal: RunJournal | None
) -> None:
    """Refuse to go on with other data; names each fact that changed and is not accepted."""
    changed = changed_facts(found.meta["facts"], facts)
    if journal is not None:
        changed = journal.resume(found.meta.get("journal", {}), found.step, changed)
    if changed:
        raise CheckpointError(
            f"{found.path} belongs to another run: {'; '.join(changed)}; put these back, "
            "start a run of another name, or go on with other data by data.accept_changed=true"
        )


def check_schema(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model; compares names and shapes over all ranks."""
    stored = {
        name: tuple(entry.size)
        for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for part in gather({name: tuple(tensor.shape) for name, tensor in state.items()}):
        wanted.update(part)
    names = sorted(stored.keys() | wanted.keys())
    differing = [name for name in names if stored.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{folder} is of another model: {len(differing)} tensors differ, the first is {name}, "
            f"of shape {stored.get(name)} in the checkpoint and {wanted.get(name)} in the "
            "configuration; put model.* back, or start a run of another name"
        )


def files_to_read(folder: Path, state: Mapping[str, Tensor]) -> set[str]:
    """Names of the files that hold something of this rank's ``state``, by the folder's index."""
    metadata = FileSystemReader(folder).read_metadata()
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(state), metadata, is_coordinator=False)
    stored: Mapping[Any, Any] = metadata.storage_data
    return {
        str(stored[item.storage_index].relative_path) for item in planner.create_local_plan().items
    }


def load_model_weights(path: Path) -> dict[str, Tensor]:
    """Full model weights by parameter name, on CPU, of a run folder's newest good checkpoint.

    ``path`` may also be one checkpoint folder. Needs no process group. Raises CheckpointError.
    """
    state = load_tensors(archive.locate(path).path, MODEL_PREFIX)
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state.items()}


def load_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors by schema name, on CPU, of one checkpoint folder; checksums are not looked at.

    ``prefix`` chooses those whose names begin so.
    """
    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    with one_process_is_fine():
        load(state, storage_reader=reader, no_dist=True)
    return state


def _cause(error: CheckpointException) -> str:
    """One line from the first failure of a collective load."""
    failed, (exception, _) = min(error.failures.items())
    text = str(exception).strip() or type(exception).__name__
    return f"rank {failed}: {text.splitlines()[0]}"
