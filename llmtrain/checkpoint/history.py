"""Going back and distrusting: what a run undoes of its checkpoints, here and on the mirror.

Invariant: before anything changes it is noted on this disk for the mirror, so a process that is
killed in between leaves nothing undone there that its next start does not know.

    history = History(run.checkpoints, mirror)
    history.resume(found)                  # every rank calls every method
    history.go_back(checkpoint, journal=left_out)
    history.line                           # [checkpoint.step]; what is saved from here on keeps it
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.objects import from_first_rank
from llmtrain.checkpoint.retention import LINE
from llmtrain.errors import CheckpointError


class History:
    """The line of history of one run (see retention.py)."""

    def __init__(self, directory: Path, mirror: Mirror | None) -> None:
        """Keep that of the checkpoints in ``directory``; ``mirror`` is on the first rank alone."""
        self._directory, self._mirror = directory, mirror
        self.line: list[int] = []
        """Steps the run has gone back to so far."""

    def resume(self, found: archive.Checkpoint | None, *, on_disk: bool) -> None:
        """Go on from ``found``, and have the mirror told what it was not told before.

        Raises CheckpointError on every rank.
        """

        def settle() -> list[int]:
            line = [] if found is None else list(found.meta.get(LINE, ()))
            mirror = self._mirror
            if mirror is None or not mirror.line:
                return line
            path = found.path if found is not None and on_disk else None
            if len(mirror.line) > len(line):
                line = mirror.line
                if path is not None:
                    archive.amend(path, **{LINE: line})
            mirror.start(path)
            return line

        self.line = self._changed(settle)

    def go_back(self, to: archive.Checkpoint, **fields: Any) -> None:
        """Delete what is newer than ``to``, and change ``fields`` of what that says of itself.

        Raises CheckpointError on every rank.
        """

        def change() -> list[int]:
            line = self._begin(to.step, aside=False)
            for step, path in archive.scan(self._directory):
                if step > to.step:
                    archive.remove(path)
            archive.amend(to.path, **fields, **{LINE: line})
            if self._mirror is not None:
                self._mirror.start(to.path)
            return line

        self.line = self._changed(change)

    def distrust(self, after: int) -> None:
        """Set aside what is of more than ``after`` steps; raises CheckpointError on every rank."""

        def change() -> list[int]:
            line, found = self._begin(after, aside=True), archive.scan(self._directory)
            for step, path in found:
                if step > after:
                    archive.set_aside(path)
            _amend_first((path for step, path in found if step <= after), line)
            if self._mirror is not None:
                self._mirror.start()
            return line

        self.line = self._changed(change)

    def _begin(self, after: int, *, aside: bool) -> list[int]:
        line = [*self.line, after]
        if self._mirror is not None:
            self._mirror.forget(line, aside=aside)
        return line

    def _changed(self, change: Callable[[], list[int]]) -> list[int]:
        def careful() -> list[int]:
            try:
                return change()
            except OSError as error:
                raise CheckpointError(f"{self._directory} cannot be written to: {error}") from error

        return from_first_rank(careful)


def _amend_first(paths: Iterable[Path], line: list[int]) -> None:
    """Have the first of the checkpoints that can be read keep ``line``."""
    for path in paths:
        with suppress(CheckpointError):
            archive.amend(path, **{LINE: line})
            return
