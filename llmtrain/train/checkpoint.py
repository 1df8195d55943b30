"""Save and restore a run: torch Distributed Checkpoint inside the committed folders of archive.py.

Tensors are logical (full shape under one global name), so a run resumes on any layout that fits.
A save that fails leaves the run and the older checkpoints as they were.

    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, engine, facts=facts)
    checkpoints.restore(progress)              # False where there is nothing to resume
    weights = load_model_weights(Path("runs/demo"))   # plain fp32 tensors, no process group
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.train import archive
from llmtrain.train.facts import changed_facts
from llmtrain.train.progress import Progress
from llmtrain.train.run_journal import RunJournal

MODEL_PREFIX = "model."
"""What stands before a parameter's name in the checkpoint schema."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """The part of an engine that checkpoints need."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors or DTensors by schema name; loaded into in place."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the loaded tensors."""
        ...


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks alike."""

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
        what changed; ``carried`` is asked at every save for what readers want to find, as the
        W&B id.
        """
        self._directory = directory
        self._config = config
        self._engine = engine
        self._facts = dict(facts)
        self._journal = journal
        self._carried = carried
        self._saved_step: int | None = None

    def due(self, progress: Progress) -> bool:
        """Whether this step is one to save after; the last one always is."""
        return progress.finished or progress.step % self._config.every_steps == 0

    def save(self, progress: Progress) -> bool:
        """Write and commit the state after ``progress.step``; False, and said, where that failed.

        Saving the same step twice writes it once.
        """
        if self._saved_step == progress.step:
            return True
        started = time.monotonic()
        problem = self._write(progress.step) or self._commit(progress)
        if problem is not None:
            logger.error(
                "the checkpoint of step %d was not written (%s); older checkpoints stay as they "
                "are: make room in %s",
                progress.step, problem, self._directory,
            )  # fmt: skip
            return False
        self._saved_step = progress.step
        logger.info("saved step %d in %.2f s", progress.step, time.monotonic() - started)
        return True

    def restore(self, progress: Progress) -> bool:
        """Load the newest good checkpoint and set ``progress`` to it; False where there is none.

        Raises CheckpointError on every rank alike: damaged, of other data, of another model.
        """
        found = _from_first_rank(lambda: archive.newest_good(self._directory, move_damaged=True))
        if found is None:
            return False
        self._check_facts(found)
        state = self._engine.state_dict()
        reader = FileSystemReader(found.path)
        _check_schema(found.path, reader, state)
        with _one_process_is_fine():
            try:
                load(state, storage_reader=reader, no_dist=not dist.is_initialized())
            except CheckpointException as error:
                raise CheckpointError(f"{found.path} cannot be read: {_cause(error)}") from error
        self._engine.load_state_dict(state)
        progress.step = found.step
        self._saved_step = found.step
        logger.info("resumed from %s", found.path)
        return True

    def _write(self, step: int) -> str | None:
        """Write all tensors aside; returns what went wrong, the same on every rank."""
        problem = _problem_of_first_rank(lambda: archive.fresh_aside(self._directory, step))
        if problem is not None:
            return problem
        writer = _Writer(archive.aside_path(self._directory, step))
        with _one_process_is_fine():
            try:
                save(
                    self._engine.state_dict(),
                    storage_writer=writer,
                    no_dist=not dist.is_initialized(),
                )
            except CheckpointException as error:
                return _cause(error)
        return None

    def _commit(self, progress: Progress) -> str | None:
        """Checksum what each rank wrote and commit; returns what went wrong."""
        aside = archive.aside_path(self._directory, progress.step)
        files: dict[str, dict[str, Any]] = {}
        for rank, part in enumerate(_gather(_digests_or_problem(aside))):
            if isinstance(part, str):
                return f"rank {rank}: {part}"
            files.update(part)
        fields = {
            "step": progress.step,
            "tokens": progress.tokens,
            "facts": self._facts,
            "journal": {} if self._journal is None else self._journal.to_plain(),
            "carried": dict(self._carried()),
            "world_size": _world_size(),
            "torch": torch.__version__,
        }

        def finish() -> None:
            archive.commit(aside, fields, files)
            archive.retire(self._directory, self._config.keep_last, progress.step)

        return _problem_of_first_rank(finish)

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


class _Writer(FileSystemWriter):
    """Names the cause of a failed write: torch's serialization hides it behind its own error."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part; raises the OSError that stopped it."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise OSError(str(cause or error)) from error


def load_model_weights(path: Path) -> dict[str, Tensor]:
    """Full model weights by parameter name, on CPU, of a run folder's newest good checkpoint.

    ``path`` may also be one checkpoint folder. Needs no process group. Raises CheckpointError.
    """
    found = archive.locate(path)
    reader = FileSystemReader(found.path)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(MODEL_PREFIX) and isinstance(entry, TensorStorageMetadata)
    }
    with _one_process_is_fine():
        load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(MODEL_PREFIX): tensor for name, tensor in state.items()}


def _check_schema(path: Path, reader: FileSystemReader, state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model; compares names and shapes over all ranks."""
    stored = {
        name: tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for part in _gather({name: tuple(tensor.shape) for name, tensor in state.items()}):
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


def _own_files(folder: Path) -> list[str]:
    """Names of the files this rank wrote; the first rank also owns the index."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = [path.name for path in folder.glob(f"__{rank}_*")]
    return [*own, ".metadata"] if rank == 0 else own


def _digests_or_problem(aside: Path) -> dict[str, dict[str, Any]] | str:
    """Checksums of what this rank wrote, or why they cannot be had; raises nothing."""
    try:
        return archive.digests(aside, _own_files(aside))
    except OSError as error:
        return str(error)


def _cause(error: CheckpointException) -> str:
    """One line from the first failure of a collective save or load."""
    rank, (exception, _) = min(error.failures.items())
    text = str(exception).strip() or type(exception).__name__
    return f"rank {rank}: {text.splitlines()[0]}"


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(value: T) -> list[T]:
    """``value`` of every rank, on every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _from_first_rank(compute: Callable[[], T]) -> T:
    """Compute on rank 0 and give the value, or its CheckpointError, to every rank."""
    box: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box[0] = compute()
        except CheckpointError as error:
            box[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    value, problem = box
    if problem is not None:
        raise CheckpointError(problem)
    result: T = value
    return result


def _problem_of_first_rank(act: Callable[[], object]) -> str | None:
    """Act on rank 0; returns on every rank what went wrong there, None where nothing did."""

    def attempt() -> str | None:
        try:
            act()
        except (OSError, CheckpointError) as error:
            return str(error)
        return None

    return _from_first_rank(attempt)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Silence torch's warning that a run of one process has no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
