"""One save on one rank: its file, its part of the checksums, and on the first rank the commit.

Ranks tell the first of their parts by a file each in the folder of the save, so that it is
committed without a collective and without the training loop; who knows better hands the parts in.

Invariant: a save is committed when all ranks' files are synced, or not at all.

    save = Save(10, aside, rank, world_size, write=write_my_file, commit=commit)
    save.start()           # write, then commit on the first rank, behind the training
    save.done.wait()
    save.problem           # None, or what went wrong in one line
"""

import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import CheckpointError
from llmtrain.run.directory import read_json, write_json

Digests = dict[str, dict[str, Any]]
"""Size and blake3 by name of file."""
Part = Digests | str
"""What a rank wrote, or why it could not."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 1.0

logger = logging.getLogger(__name__)


class Save:
    """A save that may be in flight; the events are set whatever happens."""

    def __init__(
        self,
        step: int,
        aside: Path,
        rank: int,
        world_size: int,
        *,
        write: Callable[["Save"], Digests],
        commit: Callable[["Save", Digests], None] | None,
        failed: Callable[["Save"], None] | None = None,
    ) -> None:
        """Save ``step`` into ``aside``.

        ``write`` makes this rank's files and may raise OSError; ``commit``, on the first rank,
        takes the digests of all; ``failed``, there, is told of a ``problem`` once the files are
        gone, in place of the log.
        """
        self.step = step
        self.written, self.done = threading.Event(), threading.Event()
        self.part: Part = "not written"
        """Of this rank; once ``written`` is set."""
        self.problem: str | None = None
        """Why it was not committed, in one line; once ``done`` is set, on the first rank."""
        self.aside = aside
        """Where it is written before it is committed."""
        self._rank = rank
        self._world_size = world_size
        self._write = write
        self._commit = commit
        self._failed = failed or _say
        self._given: Sequence[Part] | None = None
        self._news = threading.Event()
        self._abandoned = False

    def start(self) -> None:
        """Write and commit in a thread of its own."""
        threading.Thread(target=self._run, name=f"save-{self.step}", daemon=True).start()

    def write(self) -> None:
        """Write this rank's files and sets ``part``; raises nothing."""
        try:
            self.part = self._write(self)
        except (OSError, CheckpointError) as error:
            self.part = str(error)
        except Exception as error:  # whatever it is, peers and the loop wait for an answer
            logger.exception("the checkpoint of step %d cannot be written", self.step)
            self.part = f"{type(error).__name__}: {error}".splitlines()[0]
        self.written.set()

    def finish(self) -> None:
        """Commit once all parts are there (first rank), or tell of this rank's (others)."""
        try:
            if self._commit is None:
                self._tell()
            else:
                self._commit(self, _merged(self._collect()))
        except (OSError, CheckpointError) as error:
            self.problem = str(error)
        except Exception as error:  # as above
            logger.exception("the checkpoint of step %d cannot be committed", self.step)
            self.problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if self.problem is not None and self._commit is not None:
            shutil.rmtree(self.aside, ignore_errors=True)
            self._failed(self)
        self.done.set()

    @property
    def told(self) -> Part | None:
        """The part of this rank; None until it is written."""
        return self.part if self.written.is_set() else None

    def give(self, parts: Sequence[Part]) -> None:
        """Hand in the parts of all ranks, in their order."""
        self._given = parts
        self._news.set()

    def abandon(self) -> None:
        """Wait for no other rank any longer."""
        self._abandoned = True
        self._news.set()

    def _run(self) -> None:
        self.write()
        self.finish()

    def _tell(self) -> None:
        told = {"files": self.part} if isinstance(self.part, Mapping) else {"problem": self.part}
        write_json(part_path(self.aside, self._rank), told)

    def _collect(self) -> Sequence[Part]:
        """Wait for the parts of all ranks."""
        found: dict[int, Part] = {self._rank: self.part}
        pause_s = _SHORTEST_PAUSE_S
        while self._given is None and len(found) < self._world_size:
            for rank in range(self._world_size):
                path = part_path(self.aside, rank)
                if rank not in found and path.exists():
                    told = read_json(path)
                    found[rank] = told.get("files") or str(told.get("problem"))
            if len(found) == self._world_size:
                break
            if self._abandoned:
                late = [rank for rank in range(self._world_size) if rank not in found]
                raise CheckpointError(f"ranks {late} did not say what they wrote")
            self._news.wait(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)
        return self._given or [found[rank] for rank in range(self._world_size)]


def say_failed(step: int, problem: str, directory: Path) -> None:
    """Say in one sentence that a checkpoint was not written; on the first rank."""
    logger.error(
        "the checkpoint of step %d was not written (%s); older checkpoints stay as they are: make "
        "room in %s",
        step, problem, directory,
    )  # fmt: skip


def _say(save: Save) -> None:
    say_failed(save.step, str(save.problem), save.aside.parent)


def part_path(aside: Path, rank: int) -> Path:
    """Where a rank says what it wrote."""
    return aside / f"part-{rank:05d}.json"


def _merged(parts: Sequence[Part]) -> Digests:
    files: Digests = {}
    for rank, part in enumerate(parts):
        if isinstance(part, str):
            raise CheckpointError(f"rank {rank}: {part}")
        files.update(part)
    return files
