"""What a run goes on from: the newest good state, in the memory of the nodes or on disk.

Invariant: of the same step memory comes first, which is read faster; what is damaged is passed over
for the next older one of either kind.

    find = Find(run.checkpoints, copies, mirror)
    found = find.newest(engine)            # every rank calls it; None where there is nothing
"""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.memory_copies import MARK_FILE, MemoryCopies
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.objects import from_first_rank
from llmtrain.checkpoint.restore import Stateful, check_schema, files_to_read
from llmtrain.engine.portion import opened
from llmtrain.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Found:
    """A good state."""

    checkpoint: archive.Checkpoint
    """Whose it is and what it says of itself."""
    folder: Path
    """Where this rank reads it from."""
    in_memory: bool
    """Whether that is memory."""


@dataclass(frozen=True, slots=True)
class Find:
    """Where to look; the mirror is on the first rank alone."""

    directory: Path
    """The checkpoints on disk."""
    copies: MemoryCopies | None
    """The copies in memory."""
    mirror: Mirror | None
    """Asked where nothing is on disk."""

    def newest(self, engine: Stateful) -> Found | None:
        """Find what to load into ``engine``; every rank calls it.

        Raises:
            CheckpointError: on every rank alike: nothing is whole, or it is of another model.
        """
        on_disk = from_first_rank(self._newest_name)
        if self.copies is not None:
            self.copies.open()
        if (kept := self._in_memory(engine, on_disk)) is not None:
            return kept
        try:
            found = from_first_rank(self._on_disk)
        except CheckpointError:
            if (kept := self._in_memory(engine, 0)) is None:
                raise
            return kept
        if found is None:
            return self._in_memory(engine, 0)
        return self._in_memory(engine, found.step) or Found(found, found.path, in_memory=False)

    def _in_memory(self, engine: Stateful, at_least: int) -> Found | None:
        """Find the newest copy of at least so many steps."""
        if self.copies is None or not self.copies.usable:
            return None
        state = opened(engine.state_dict())

        def files_of(folder: Path) -> set[str]:
            check_schema(folder, state)
            return files_to_read(folder, state)

        kept = self.copies.newest(at_least, files_of)
        return None if kept is None else Found(*kept, in_memory=True)

    def _newest_name(self) -> int:
        """Clean up, and give the step of the newest checkpoint on disk, whole or not; or -1."""
        archive.clean(self.directory)
        if self.copies is None:  # what is in memory from before must not be met later
            (self.directory / MARK_FILE).unlink(missing_ok=True)
        return max((step for step, _ in archive.scan(self.directory)), default=-1)

    def _on_disk(self) -> archive.Checkpoint | None:
        found = archive.newest_good(self.directory, move_damaged=True)
        if found is None and self.mirror is not None:
            return self.mirror.fetch(self.directory)
        return found
