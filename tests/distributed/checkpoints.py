"""Bodies that ranks run in the tests of checkpoints."""

import resource
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.train.checkpoint import Checkpoints
from llmtrain.train.progress import Progress


class Part:
    """One stage's tensors: names differ from rank to rank."""

    def __init__(self, rank: int, value: float) -> None:
        self.tensors = {
            f"model.layer{rank}.weight": torch.full((64, 64), value + rank),
            "optim.step": torch.tensor(value),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tensors = dict(state)


def make(folder: str, part: Part) -> Checkpoints:
    return Checkpoints(Path(folder), CheckpointConfig(), part, facts={"seed": "0"})


def full_disk_on_one_rank(place: Place, folder: str) -> tuple[bool, bool, bool, float]:
    """Save, save while rank 1 cannot write, save again; then restore."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        part = Part(place.rank, value=1.0)
        checkpoints = make(folder, part)
        progress = Progress(num_steps=100, steps=StepSchedule(8, 8), step=1)
        first = checkpoints.save(progress)
        progress.step = 2
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if place.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        second = checkpoints.save(progress)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        fresh = Part(place.rank, value=7.0)
        restored = make(folder, fresh).restore(progress)
        return first, second, restored and progress.step == 1, float(fresh.tensors["optim.step"])


def restore_damaged(place: Place, folder: str) -> str:
    """The message of a restore, which every rank gets."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        try:
            make(folder, Part(place.rank, value=0.0)).restore(
                Progress(num_steps=100, steps=StepSchedule(8, 8))
            )
        except CheckpointError as error:
            return str(error)
    return ""
