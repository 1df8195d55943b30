"""Save and restore a run: torch Distributed Checkpoint inside the committed folders of archive.py.

Tensors are logical (full shape under one global name), so a run resumes on any layout that fits. A
save copies this rank's part of the state to host memory and goes on behind the training; at most
one is in flight. A save that fails leaves the run and the older checkpoints as they were.

Invariant: what is written is the state at the call of ``save``: an engine that has
``before_update`` is copied while it computes gradients and waits before it changes anything, any
other state is copied before ``save`` returns.

    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, engine, facts=facts)
    checkpoints.restore(progress)              # False where there is nothing to resume
    checkpoints.save(progress)
    checkpoints.wait()                         # whether it is on disk
    weights = load_model_weights(Path("runs/demo"))   # plain fp32 tensors, no process group
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from llmtrain.config.training import CheckpointConfig
from llmtrain.engine.portion import opened
from llmtrain.errors import CheckpointError
from llmtrain.train import archive, room, tensor_files
from llmtrain.train.facts import changed_facts
from llmtrain.train.mirror import Mirror
from llmtrain.train.objects import (
    from_first_rank,
    gather,
    gather_at_first,
    one_process_is_fine,
    rank,
    scatter,
    share,
    world_size,
)
from llmtrain.train.progress import Progress
from llmtrain.train.retention import Keep, retire
from llmtrain.train.run_journal import RunJournal
from llmtrain.train.saving import Digests, Save, say_failed
from llmtrain.train.staging import Staging
from llmtrain.train.tensor_files import INDEX, RankFile

MODEL_PREFIX = "model."
"""What stands before a parameter's name in the checkpoint schema."""

CLOSING_S = 10.0
"""Seconds that a save in flight has to end when the run has failed."""

_SPARE_BYTES = 1 << 16

logger = logging.getLogger(__name__)


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


class Checkpoints:
    """The checkpoints of one run; every method but ``close`` is called by all ranks alike."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        engine: Stateful,
        *,
        facts: Mapping[str, str],
        journal: RunJournal | None = None,
        carried: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """Keep checkpoints of ``engine`` in ``directory``.

        ``facts`` (see facts.py) must be the same for a run to go on, or ``journal`` must accept
        what changed; ``carried`` is asked at every save on the first rank for what readers want to
        find, as the W&B id.
        """
        self._directory = directory
        self._config = config
        self._engine = engine
        self._facts = dict(facts)
        self._journal = journal
        self._carried = carried
        self._mirror = Mirror.of(config) if config.mirror and rank() == 0 else None
        self._file: RankFile | None = None
        self._index, self._bytes = b"", 0
        self._staging: Staging | None = None
        self._save: Save | None = None
        self._saves = 0
        self._saved_step: int | None = None
        self._failed = False
        self.stalled_s = 0.0
        """Seconds the training loop has stood still for saves so far."""
        self.save_s: float | None = None
        """Seconds the newest save took until it was on disk, on the first rank."""
        self.scores: Callable[[int], Mapping[str, float]] = lambda step: {}
        """What held-out evaluation measured at a step, for ``checkpoint.keep_best``."""
        self.guard: Callable[[], Mapping[str, Any]] = dict
        """What the guard goes on from (see guard.py)."""
        self.restored: archive.Checkpoint | None = None
        """What the run went on from; None where it began."""

    def due(self, progress: Progress) -> bool:
        """Whether this step is one to save after; the last one always is."""
        return progress.finished or progress.step % self._config.every_steps == 0

    def prepare(self) -> None:
        """Settle who writes what and take the memory for copies, so that no save has to.

        Deletes what a killed process has left.
        """
        if self._file is not None:
            return
        from_first_rank(lambda: archive.clean(self._directory))
        state = self._engine.state_dict()
        plans = gather_at_first(tensor_files.own_items(state, rank() == 0))
        chosen, metadata = (None, None) if plans is None else tensor_files.share_out(plans)
        file = tensor_files.place(scatter(chosen), f"__{rank()}_0.distcp")
        entries = gather_at_first(file.entries)
        if metadata is not None and entries is not None:
            self._index = tensor_files.index_file(metadata, entries)
            self._bytes = sum(about.length for part in entries for _, about in part)
        self._file = file
        if self._config.asynchronous:
            self._take_memory(file, state)

    def check_room(self, progress: Progress) -> None:
        """Warn of a disk that is too small for what is to stay; every rank calls it, prepared.

        Raises CheckpointError on every rank alike where not even one checkpoint fits.
        """
        from_first_rank(lambda: room.check(
            self._directory, need=self._need, config=self._config, step=progress.step,
            held=len(archive.scan(self._directory)), num_steps=progress.num_steps,
        ))  # fmt: skip

    def save(self, progress: Progress) -> bool:
        """Save the state after ``progress.step``; False where this or the save before has failed.

        That is said already, by the first rank. Saving the same step twice writes it once.
        """
        if progress.step in (self._saved_step, self._save and self._save.step):
            return True
        started = time.perf_counter()
        self._say_if_waiting()
        before = self._save is None or self._settle()
        self.prepare()
        if (problem := from_first_rank(self._no_room)) is not None:
            self._failed = True
            if rank() == 0:
                say_failed(progress.step, problem, self._directory)
            return False
        save = self._save = self._begin(progress)
        save.start()
        if self._staging is None or not hasattr(self._engine, "before_update"):
            save.staged.wait()
        if self._staging is None:
            before = self._settle() and before
        self._stood(save, time.perf_counter() - started)
        return before

    def wait(self) -> bool:
        """Wait for the save in flight; whether the last save that was asked for is on disk."""
        started = time.perf_counter()
        save = self._save
        saved = self._settle()
        if save is not None:
            self._stood(save, time.perf_counter() - started)
        return saved

    def wait_for_mirror(self) -> None:
        """Wait until the mirror, where there is one, has the newest checkpoint or cannot."""
        if self._mirror is not None:
            self._mirror.wait()

    def close(self) -> None:
        """Let a save in flight end within a few seconds, and give the memory back.

        Runs no collective: other ranks may be gone.
        """
        save, self._save = self._save, None
        if save is not None and not save.done.wait(CLOSING_S):
            save.abandon()
            logger.warning("the save of step %d was not ended in %g s", save.step, CLOSING_S)
        elif self._staging is not None:
            self._staging.close()
        self._staging = None

    def restore(self, progress: Progress) -> bool:
        """Load the newest good checkpoint and set ``progress`` to it; False where there is none.

        Raises CheckpointError on every rank alike: damaged, of other data, of another model.
        """
        self._settle()
        found = from_first_rank(self._newest)
        if found is None:
            return False
        self._check_facts(found)
        state = opened(self._engine.state_dict())
        reader = FileSystemReader(found.path)
        _check_schema(found.path, reader, state)
        with one_process_is_fine():
            try:
                load(state, storage_reader=reader, no_dist=not dist.is_initialized())
            except CheckpointException as error:
                raise CheckpointError(f"{found.path} cannot be read: {_cause(error)}") from error
        self._engine.load_state_dict(state)
        progress.step = found.step
        self._saved_step = found.step
        self.restored = found
        logger.info("resumed from %s", found.path)
        return True

    def before(self, step: int) -> archive.Checkpoint | None:
        """Find the newest good checkpoint of fewer than ``step`` steps; waits for saves in flight.

        None where there is none. Raises CheckpointError on every rank alike.
        """
        self._settle()
        return from_first_rank(
            lambda: archive.newest_good(self._directory, move_damaged=True, before_step=step)
        )

    def go_back(self, to: archive.Checkpoint, **fields: Any) -> None:
        """Make ``to`` the newest, and change ``fields`` of what it says of itself.

        The tensors are not touched; ``restore`` loads them. Raises CheckpointError on every rank.
        """

        def change() -> None:
            try:
                for step, path in archive.scan(self._directory):
                    if step > to.step:
                        archive.remove(path)
                archive.amend(to.path, **fields)
            except OSError as error:
                raise CheckpointError(f"{to.path} cannot be written to: {error}") from error
            if self._mirror is not None:
                self._mirror.start(to.path)

        from_first_rank(change)

    def distrust(self, after: int) -> None:
        """Set aside the checkpoints of more than ``after`` steps: what they hold may be wrong."""
        self._settle()

        def change() -> None:
            for step, path in archive.scan(self._directory):
                if step > after:
                    archive.set_aside(path)

        from_first_rank(change)

    def _newest(self) -> archive.Checkpoint | None:
        """Clean up, and find what to go on from: here, or in the mirror where nothing is here."""
        archive.clean(self._directory)
        found = archive.newest_good(self._directory, move_damaged=True)
        if found is None and self._mirror is not None:
            return self._mirror.fetch(self._directory)
        return found

    def _take_memory(self, file: RankFile, state: Mapping[str, Tensor]) -> None:
        """Make the staging memory, on all ranks or on none."""
        device = next((t.device for t in state.values() if t.is_cuda), torch.device("cpu"))
        staging, problem = None, ""
        try:
            staging = Staging(file.pieces, device)
        except RuntimeError as error:
            problem = f"rank {rank()}: {str(error).splitlines()[0]}"
        problems = [problem for problem in gather(problem) if problem]
        if problems:
            logger.warning(
                "checkpoint.asynchronous=true needs host memory for a copy of the state, which "
                "cannot be had (%s): training will stand still for saves", problems[0],
            )  # fmt: skip
            return
        self._staging = staging
        if hasattr(self._engine, "before_update"):
            self._engine.before_update(self._until_staged)

    def _no_room(self) -> str | None:
        """What the disk lacks, before it is filled: other files of the run grow there too."""
        try:
            free = room.free_bytes(self._directory)
        except OSError as error:
            return str(error)
        if free >= self._need:
            return None
        return f"No space left on device: it needs {self._need:,} bytes, {free:,} are free"

    @property
    def _need(self) -> int:
        """Bytes of a checkpoint, once prepared; on the first rank."""
        return self._bytes + len(self._index) + _SPARE_BYTES

    def _until_staged(self) -> None:
        """Hold the engine up while the state it is about to change is still being copied."""
        if self._save is not None and not self._save.staged.is_set():
            started = time.perf_counter()
            self._save.staged.wait()
            self._stood(self._save, time.perf_counter() - started)

    def _begin(self, progress: Progress) -> Save:
        """Everything about a save that has to be settled at this step."""
        self._saves += 1
        aside = archive.aside_path(self._directory, progress.step, self._saves)
        state, staging = self._engine.state_dict(), self._staging
        ready = None if staging is None else staging.ready()
        started = time.monotonic()
        fields = {
            "step": progress.step,
            "tokens": progress.tokens,
            "facts": self._facts,
            "journal": {} if self._journal is None else self._journal.to_plain(),
            "guard": dict(self.guard()),
            "carried": dict(self._carried()) if rank() == 0 else {},
            "scores": dict(self.scores(progress.step)),
            "world_size": world_size(),
            "torch": torch.__version__,
        }

        def write(save: Save) -> Digests:
            if staging is not None:
                staging.copy(state, ready)
                save.staged.set()
            return self._write(aside, state, staging)

        def commit(save: Save, files: Digests) -> None:
            self._commit(save, aside, fields, files)
            self.save_s = time.monotonic() - started
            logger.info(
                "saved step %d in %.2f s, training stood still for %.2f s of them",
                save.step, self.save_s, save.stalled_s,
            )  # fmt: skip

        return Save(
            progress.step, aside, rank(), world_size(),
            write=write, commit=commit if rank() == 0 else None,
        )  # fmt: skip

    def _write(self, aside: Path, state: Mapping[str, Tensor], staging: Staging | None) -> Digests:
        """Write this rank's files, from the copies or from the state itself."""
        if self._file is None:
            raise RuntimeError("prepare() comes before a save")
        pieces = self._file.pieces
        values = staging.values if staging else (piece.on_host(state) for piece in pieces)
        aside.mkdir(parents=True, exist_ok=True)
        files = {self._file.name: tensor_files.write(aside / self._file.name, pieces, values)}
        if self._index:
            files[INDEX] = tensor_files.write_bytes(aside / INDEX, [self._index])
        return files

    def _commit(self, save: Save, aside: Path, fields: Mapping[str, Any], files: Digests) -> None:
        path = archive.commit(aside, fields, files)
        busy = () if self._mirror is None else self._mirror.start(path)
        retire(self._directory, Keep.of(self._config), save.step, busy)

    def _say_if_waiting(self) -> None:
        if self._save is not None and not self._save.done.is_set() and rank() == 0:
            logger.warning(
                "the save of step %d is still being written: training waits for it; raise "
                "checkpoint.every_steps=%d, or save to a faster disk",
                self._save.step, self._config.every_steps,
            )  # fmt: skip

    def _settle(self) -> bool:
        """Wait for the save in flight and agree on its outcome; whether the last one is on disk."""
        save, self._save = self._save, None
        if save is not None:
            save.written.wait()
            if rank() > 0:
                save.done.wait()
            save.give(gather(save.part))
            save.done.wait()
            self._failed = share(save.problem) is not None
            self._saved_step = self._saved_step if self._failed else save.step
        return not self._failed

    def _stood(self, save: Save, seconds: float) -> None:
        save.stalled_s += seconds
        self.stalled_s += seconds

    def _check_facts(self, found: archive.Checkpoint) -> None:
        """Refuse to go on with other data; names each fact that changed and is not accepted."""
        changed = changed_facts(found.meta["facts"], self._facts)
        if self._journal is not None:
            changed = self._journal.resume(found.meta.get("journal", {}), found.step, changed)
        if changed:
            raise CheckpointError(
                f"{found.path} belongs to another run: {'; '.join(changed)}; put these back, "
                "start a run of another name, or go on with other data by data.accept_changed=true"
            )


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


def _check_schema(path: Path, reader: FileSystemReader, state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model; compares names and shapes over all ranks."""
    stored = {
        name: tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
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
            f"{path} is of another model: {len(differing)} tensors differ, the first is {name}, "
            f"of shape {stored.get(name)} in the checkpoint and {wanted.get(name)} in the "
            "configuration; put model.* back, or start a run of another name"
        )


def _cause(error: CheckpointException) -> str:
    """One line from the first failure of a collective save or load."""
    failed, (exception, _) = min(error.failures.items())
    text = str(exception).strip() or type(exception).__name__
    return f"rank {failed}: {text.splitlines()[0]}"
