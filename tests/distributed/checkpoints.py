"""Bodies that ranks run in the tests of checkpoints."""

import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.checkpoint import archive, objects
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.mirror_folder import MirrorFolder
from llmtrain.checkpoint.staging import Staging
from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.run import RunConfig
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from tests.distributed.rig import digest, rig_in


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
        first = checkpoints.save(progress) and checkpoints.wait()
        progress.step = 2
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if place.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        checkpoints.save(progress)
        second = checkpoints.wait()
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


def slowly(self: Staging, *arguments: Any) -> None:
    """Copy late, so that a step that did not wait would change the state before."""
    time.sleep(0.6)
    COPY(self, *arguments)


COPY = Staging.copy
SAVED = 2
NEXT = range(SAVED, SAVED + 3)


def resume_while_training(
    place: Place, config: RunConfig, folder: str
) -> tuple[bool, list[float], list[float], bool]:
    """Save behind three more steps; then restore elsewhere and take the same steps."""
    steps = StepSchedule(8, 8)
    with World(config.parallel, config.engine, place) as world:
        with rig_in(world, config) as r:
            r.train(range(SAVED))
            checkpoints = Checkpoints(Path(folder), CheckpointConfig(), r.engine, facts={})
            Staging.copy = slowly  # type: ignore[method-assign]
            try:
                checkpoints.save(Progress(num_steps=100, steps=steps, step=SAVED))
                losses = r.train(NEXT)
                saved = checkpoints.wait()
            finally:
                Staging.copy = COPY  # type: ignore[method-assign]
            expected = digest(r.engine.full_parameters())
        with rig_in(world, config) as r:
            Checkpoints(Path(folder), CheckpointConfig(), r.engine, facts={}).restore(
                Progress(num_steps=100, steps=steps)
            )
            again = r.train(NEXT)
            same = digest(r.engine.full_parameters()) == expected
    return saved, losses, again, same


def save_for_ever(place: Place, folder: str) -> None:
    """Save step after step until killed."""
    torch.set_num_threads(1)
    with World(ParallelConfig(dp_replicate=place.world_size), EngineConfig(), place):
        part = Part(place.rank, value=0.0)
        part.tensors[f"model.layer{place.rank}.weight"] = torch.zeros(512, 512)
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(keep_last=2), part, facts={})
        checkpoints.restore(progress := Progress(num_steps=10**9, steps=StepSchedule(8, 8)))
        while True:
            progress.step += 1
            for tensor in part.tensors.values():
                tensor.fill_(progress.step)
            checkpoints.save(progress)


def restored_values(place: Place, folder: str) -> tuple[int, set[float], list[str]]:
    """Step and values of what is restored, and what is left of saves that were not finished."""
    with World(ParallelConfig(dp_replicate=place.world_size), EngineConfig(), place):
        part = Part(place.rank, value=-1.0)
        part.tensors[f"model.layer{place.rank}.weight"] = torch.zeros(512, 512)
        checkpoints = Checkpoints(Path(folder), CheckpointConfig(), part, facts={})
        checkpoints.restore(progress := Progress(num_steps=10**9, steps=StepSchedule(8, 8)))
        values = {value for t in part.tensors.values() for value in t.unique().tolist()}
    return progress.step, values, sorted(path.name for path in Path(folder).glob(".*"))


TIMEOUT_S = 3.0
HASH, BRING = archive._file_digest, MirrorFolder.get


def hash_slowly(path: Path, tally: archive.Tally) -> str:
    """Read for longer than a collective may last, and show that it goes on."""
    for _ in range(25):
        time.sleep(0.2)
        tally.add(1)
    return HASH(path, tally)


def bring_slowly(self: MirrorFolder, step: int, aside: Path) -> None:
    for number in range(25):
        time.sleep(0.2)
        (aside / "arriving").write_bytes(bytes(number))
    (aside / "arriving").unlink()
    BRING(self, step, aside)


def find_slowly(place: Place, folder: str, mirror: str) -> tuple[int, int, list[int]]:
    """Check a checkpoint, then fetch it, each longer than collectives may last; steps and beats."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    config = CheckpointConfig(mirror=mirror, asynchronous=False)
    with World(parallel, EngineConfig(timeout_s=TIMEOUT_S), place):
        part, steps = Part(place.rank, value=1.0), StepSchedule(8, 8)
        progress = Progress(num_steps=100, steps=steps, step=3)
        beats: list[float] = []

        def restored(config: CheckpointConfig) -> int:
            progress = Progress(num_steps=100, steps=steps)
            Checkpoints(
                Path(folder), config, part, facts={}, beat=lambda: beats.append(time.monotonic())
            ).restore(progress)
            return progress.step

        saver = Checkpoints(Path(folder), config, part, facts={})
        saver.save(progress)
        saver.wait_for_mirror()
        archive._file_digest = hash_slowly
        try:
            checked = restored(CheckpointConfig())
        finally:
            archive._file_digest = HASH
        objects.gather(None)
        if place.rank == 0:
            shutil.rmtree(folder)
        objects.gather(None)
        MirrorFolder.get = bring_slowly  # type: ignore[method-assign]
        try:
            fetched = restored(config)
        finally:
            MirrorFolder.get = BRING  # type: ignore[method-assign]
    return checked, fetched, len(beats)


def hash_own_part(place: Place, folder: str) -> tuple[int, int]:
    """Bytes this rank reads to check a checkpoint, and those of the checkpoint."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    read = []

    def count(path: Path, tally: archive.Tally) -> str:
        read.append(path.stat().st_size)
        return HASH(path, tally)

    with World(parallel, EngineConfig(timeout_s=30.0), place):
        part = Part(place.rank, value=1.0)
        progress = Progress(num_steps=100, steps=StepSchedule(8, 8), step=3)
        checkpoints = make(folder, part)
        checkpoints.save(progress)
        assert checkpoints.wait()
        archive._file_digest = count
        try:
            assert make(folder, part).restore(progress)
        finally:
            archive._file_digest = HASH
        opened = archive.open_unread(Path(folder) / archive.folder_name(3))
    return sum(read), sum(record["bytes"] for record in opened.meta["files"].values())


def stand_still(place: Place) -> str:
    """Wait for work of another rank that does not move, or fails; what this rank is told."""
    parallel = ParallelConfig(dp_replicate=place.world_size)
    said = []
    with World(parallel, EngineConfig(timeout_s=30.0), place):
        objects.STILL_S, before = 2.0, objects.STILL_S
        try:
            for work in (lambda: time.sleep(8.0), _fail):
                alone = work if place.rank == 1 else lambda: None
                try:
                    objects.together(alone, lambda: 0, lambda: None)
                except (OSError, RuntimeError) as error:
                    said.append(f"{type(error).__name__}: {error}")
        finally:
            objects.STILL_S = before
    return "; ".join(said)


def _fail() -> None:
    raise PermissionError("not yours")
