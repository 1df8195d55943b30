"""What a run goes on from: the newest good state, in the memory of the nodes or on disk.

Invariant: of the same step memory comes first, which is read faster; what is damaged is passed over
for the next older one of either kind. A disk that is behind the mirror gives way to it. The ranks
share the reading that a check takes, and no collective lasts as long as that or as what comes from
the mirror.

    find = Find(run.checkpoints, copies, mirror, beat)
    found = find.newest(engine)            # every rank calls it; None where there is nothing
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.memory_copies import MARK_FILE, MemoryCopies
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.objects import from_first_rank, rank, share, together, world_size
from llmtrain.checkpoint.restore import Stateful, check_schema, files_to_read
from llmtrain.checkpoint.retention import LINE, undone
from llmtrain.engine.portion import opened
from llmtrain.errors import CheckpointError

logger = logging.getLogger(__name__)


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
    """Asked for what is newer than the disk's."""
    beat: Callable[[], None] = lambda: None
    """Called while something long moves."""

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
            found = self._on_disk()
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

    def before(self, step: int) -> archive.Checkpoint | None:
        """Find the newest good one on disk of fewer than ``step`` steps; every rank calls it.

        None where there is none. Raises CheckpointError on every rank alike.
        """
        found = from_first_rank(lambda: archive.scan(self.directory))
        return self._good([path for number, path in found if number < step])

    def _on_disk(self) -> archive.Checkpoint | None:
        """Find the newest good one of the disk and the mirror; the latter is then on disk too."""
        paths = [path for _, path in from_first_rank(lambda: archive.scan(self.directory))]
        if not share(self.mirror is not None):
            return self._good(paths)
        try:
            here = self._good(paths)
        except CheckpointError as damaged:
            if (fetched := self._fetched(None)) is None:
                raise damaged from None
            return fetched
        return self._fetched(here) or here

    def _good(self, paths: list[Path]) -> archive.Checkpoint | None:
        return archive.first_good(self.directory, paths, self._checked, move_damaged=rank() == 0)

    def _checked(self, path: Path) -> archive.Checkpoint:
        """Open a checkpoint; each rank reads a part of the files, the first what is in doubt."""
        opened = from_first_rank(lambda: archive.open_unread(path))
        mine = sorted(opened.meta["files"])[rank() :: world_size()]
        tally = archive.Tally()

        def doubtful() -> list[str]:
            try:
                return archive.differing(opened, mine, tally)
            except OSError:
                return mine

        def bad() -> list[str]:
            return archive.differing(opened, doubted, tally) if rank() == 0 else []

        def moved() -> int:
            return tally.num_bytes

        doubted = sorted(name for part in together(doubtful, moved, self.beat) for name in part)
        if doubted:
            archive.refuse(path, together(bad, moved, self.beat)[0])
        return opened

    def _fetched(self, here: archive.Checkpoint | None) -> archive.Checkpoint | None:
        """Bring one from the mirror that is ahead of ``here``, on the first rank."""
        mirror, tally = self.mirror, archive.Tally()

        def fetch() -> archive.Checkpoint | None:
            found = None if mirror is None else mirror.fetch(self.directory, tally, here)
            if found is not None:
                self._leave(found)
            return found

        def moved() -> int:
            return tally.num_bytes + (0 if mirror is None else _arriving_bytes(self.directory))

        return together(fetch, moved, self.beat)[0]

    def _leave(self, fetched: archive.Checkpoint) -> None:
        """Set aside what the disk holds of a history that the run has left."""
        for step, path in archive.scan(self.directory):
            if step > fetched.step or undone(step, _line(path), fetched.meta.get(LINE, ())):
                logger.warning("%s is set aside: the run went on without it", path.name)
                archive.set_aside(path)


def _line(path: Path) -> list[int]:
    try:
        return list(archive.read_meta(path).get(LINE, ()))
    except CheckpointError:
        return []


def _arriving_bytes(directory: Path) -> int:
    """Bytes of what is not committed yet."""
    total = 0
    for path in archive.uncommitted(directory):
        with suppress(FileNotFoundError):  # it may be given its name at any time
            total += sum(file.stat().st_size for file in path.iterdir())
    return total
