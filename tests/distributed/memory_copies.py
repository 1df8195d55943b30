"""Bodies that ranks run in the tests of copies in memory: every rank is a node of its own."""

import resource
import shutil
from pathlib import Path

import torch

from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.node_links import Links
from llmtrain.checkpoint.objects import gather
from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import CheckpointConfig
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from tests.distributed.checkpoints import Part


def make(root: str, part: Part, node: str, every_steps: int = 10) -> Checkpoints:
    config = CheckpointConfig(
        every_steps=every_steps, memory_every_steps=2, memory_dir=f"{root}/memory"
    )
    return Checkpoints(Path(root) / "run/checkpoints", config, part, facts={}, node=node)


def train(place: Place, root: str, last: int, nodes: list[str]) -> list[str]:
    """Do steps up to ``last``, each of which sets every number to it; the files of this node."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        part = Part(place.rank, value=0.0)
        checkpoints = make(root, part, nodes[place.rank])
        checkpoints.restore(progress := Progress(num_steps=100, steps=StepSchedule(8, 8)))
        checkpoints.prepare()
        while progress.step < last:
            progress.advance()
            for tensor in part.tensors.values():
                tensor.fill_(progress.step)
            if checkpoints.due(progress):
                checkpoints.save(progress)
                checkpoints.wait()
        gather(None)
        checkpoints.close()
        folder = next(Path(root).glob(f"memory/*/{nodes[place.rank]}"))
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.distcp"))


def resume(
    place: Place, root: str, nodes: list[str], names: int
) -> tuple[int, set[float], bool, list[str]]:
    """Go on with the tensors of ``names`` ranks, all of which the ranks here share.

    Gives the step, the values, whether there was something, and what lies in this node's memory.
    """
    parallel = ParallelConfig(dp_replicate=place.world_size)
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        part = Part(place.rank % names, value=-1.0)
        for other in range(place.rank, names, place.world_size):
            part.tensors |= Part(other, value=-1.0).tensors
        checkpoints = make(root, part, nodes[place.rank])
        restored = checkpoints.restore(
            progress := Progress(num_steps=100, steps=StepSchedule(8, 8))
        )
        gather(None)
        checkpoints.close()
        values = torch.cat([tensor.flatten() for tensor in part.tensors.values()])
        folder = next(Path(root).glob(f"memory/*/{nodes[place.rank]}"))
        return (
            progress.step, set(values.tolist()), restored,
            sorted(path.name for path in folder.iterdir()),
        )  # fmt: skip


def lose(root: str, node: str) -> None:
    """Take away the memory of a node."""
    shutil.rmtree(next(Path(root).glob(f"memory/*/{node}")))


def save_for_ever(place: Place, root: str, nodes: list[str]) -> None:
    """Keep every second step in memory as fast as it goes, until killed."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        part = Part(place.rank, value=0.0)
        checkpoints = make(root, part, nodes[place.rank], every_steps=10**9)
        progress = Progress(num_steps=10**9, steps=StepSchedule(8, 8))
        checkpoints.restore(progress)
        checkpoints.prepare()
        while True:
            progress.advance()
            for tensor in part.tensors.values():
                tensor.fill_(progress.step)
            if checkpoints.due(progress):
                checkpoints.save(progress)


def full_on_one_rank(place: Place, root: str) -> tuple[list[int], list[int]]:
    """Two ranks of one node, of which one can write nothing for a while; steps kept then and later.

    It cannot even tell of it by a file.
    """
    parallel = ParallelConfig(dp_replicate=place.world_size)
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        checkpoints = make(root, Part(place.rank, value=0.0), "a")
        progress = Progress(num_steps=100, steps=StepSchedule(8, 8))
        checkpoints.restore(progress)
        checkpoints.prepare()
        kept = []
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step, limit in ((2, 0), (4, soft)):
            progress.step = step
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if place.rank else soft, hard))
            checkpoints.save(progress)
            checkpoints.wait()
            gather(None)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            found = Path(root).glob("memory/*/a/step-*")
            kept.append(sorted(int(path.name.removeprefix("step-")) for path in found))
        checkpoints.close()
        return kept[0], kept[1]


def out_of_reach(place: Place, root: str, nodes: list[str]) -> list[int]:
    """Save where no node is found at the address it gives; the steps that were due."""
    offer = Links.offer
    Links.offer = property(lambda self: {**offer.__get__(self), "port": 1})  # type: ignore[assignment]
    try:
        parallel = ParallelConfig(dp_replicate=place.world_size)
        with World(parallel, EngineConfig(timeout_s=30.0), place):
            checkpoints = make(root, Part(place.rank, value=0.0), nodes[place.rank])
            progress = Progress(num_steps=100, steps=StepSchedule(8, 8))
            checkpoints.restore(progress)
            checkpoints.prepare()
            due = []
            for step in range(1, 11):
                progress.step = step
                if checkpoints.due(progress):
                    due.append(step)
                    checkpoints.save(progress)
            assert checkpoints.wait()
            checkpoints.close()
            return due
    finally:
        Links.offer = offer  # type: ignore[method-assign]
