"""What this rank writes of every checkpoint of a run, settled once, and the memory for a copy.

Invariant: who writes what follows from the layout alone, so no save needs a collective for it. The
state is held until its snapshot is taken: an engine that has ``before_update`` goes on computing
gradients meanwhile and waits before it changes anything.

    writer = Writer(engine, run.checkpoints, asynchronous=True)
    writer.prepare()                                         # every rank calls it
    snapshot = writer.snapshot(to_memory=False, to_disk=True)
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.checkpoint import room, tensor_files
from llmtrain.checkpoint.objects import from_first_rank, gather, gather_at_first, rank, scatter
from llmtrain.checkpoint.restore import Stateful
from llmtrain.checkpoint.saving import say_failed
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.checkpoint.staging import Staging
from llmtrain.checkpoint.tensor_files import RankFile

_SPARE_BYTES = 1 << 16

logger = logging.getLogger(__name__)


class Writer:
    """The files of one rank; all ranks call every method but ``close`` and ``stood`` alike."""

    def __init__(self, engine: Stateful, directory: Path, *, asynchronous: bool) -> None:
        """Write the state of ``engine`` into ``directory``, from a copy if asynchronous."""
        self._engine = engine
        self._directory = directory
        self._asynchronous = asynchronous
        self.file: RankFile | None = None
        """What this rank writes; once prepared."""
        self.staging: Staging | None = None
        """Memory for the copy, where there is one."""
        self.last: Snapshot | None = None
        """The newest snapshot."""
        self.stalled_s = 0.0
        """Seconds the training loop has stood still for saves so far."""
        self._index, self._bytes = b"", 0

    def prepare(self) -> None:
        """Settle who writes what, and take the memory."""
        state = self._engine.state_dict()
        plans = gather_at_first(tensor_files.own_items(state, rank() == 0))
        chosen, metadata = (None, None) if plans is None else tensor_files.share_out(plans)
        file = self.file = tensor_files.place(scatter(chosen), f"__{rank()}_0.distcp")
        entries = gather_at_first(file.entries)
        if metadata is not None and entries is not None:
            self._index = tensor_files.index_file(metadata, entries)
            self._bytes = sum(about.length for part in entries for _, about in part)
        if self._asynchronous:
            self._take_memory(file, state)

    @property
    def own_bytes(self) -> int:
        """Bytes this rank writes."""
        return sum(about.length for _, about in self.file.entries) if self.file else 0

    @property
    def all_bytes(self) -> int:
        """Bytes of a checkpoint; on the first rank."""
        return self._bytes + len(self._index) + _SPARE_BYTES

    def has_room(self, step: int) -> bool:
        """Whether the disk has room before it is filled: other files of the run grow there too."""

        def problem() -> str | None:
            try:
                free = room.free_bytes(self._directory)
            except OSError as error:
                return str(error)
            if free >= self.all_bytes:
                return None
            need = f"it needs {self.all_bytes:,} bytes, {free:,} are free"
            return f"No space left on device: {need}"

        found = from_first_rank(problem)
        if found is not None and rank() == 0:
            say_failed(step, found, self._directory)
        return found is None

    def snapshot(self, *, to_memory: bool, to_disk: bool) -> Snapshot:
        """Take the state of this moment, once the snapshot before has been written."""
        if self.file is None:
            raise RuntimeError("prepare() comes before a save")
        if self.last is not None:
            self.last.free.wait()
        self.last = Snapshot(
            self._engine.state_dict(), self.file, self._index, self.staging,
            to_memory=to_memory, to_disk=to_disk,
        )  # fmt: skip
        return self.last

    def until_taken(self, *, may_change_later: bool = False) -> None:
        """Hold the caller up while the state is still being copied.

        With ``may_change_later`` not where the engine itself waits before it changes anything.
        """
        waits = self.staging is not None and hasattr(self._engine, "before_update")
        if self.last is not None and not (may_change_later and waits):
            self.last.taken.wait()

    def stood(self, seconds: float) -> None:
        """Count time that training stood still."""
        self.stalled_s += seconds
        if self.last is not None:
            self.last.stalled_s += seconds

    def close(self, writing: bool) -> None:
        """Give the memory back, unless somebody is still ``writing`` from it."""
        if self.staging is not None and not writing:
            self.staging.close()
        self.staging = None

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
        self.staging = staging
        if hasattr(self._engine, "before_update"):
            self._engine.before_update(self._before_update)

    def _before_update(self) -> None:
        if self.last is not None and not self.last.taken.is_set():
            started = time.perf_counter()
            self.last.taken.wait()
            self.stood(time.perf_counter() - started)
