"""A copy of every checkpoint on another file system: an object store, or any other of fsspec.

It is made behind the training, of what is committed here, and follows the run where that goes back:
what is undone is noted here first (``checkpoints/mirror.json``), until the mirror knows it too.

Invariant: a copy that was cut short does not exist; what comes back is checked like any checkpoint
and is of the run's line of history (see retention.py), as far as this disk and the mirror know it.

    mirror = Mirror("s3://bucket/runs/demo", keep, run.checkpoints)
    mirror.start(path)                  # in a thread of its own; of several, the newest is next
    mirror.forget([15])                 # the run goes back to step 15: done by the next start
    mirror.fetch(run.checkpoints)       # None where the mirror holds none
    mirror.fetch(run.checkpoints, here=found)        # or none that is ahead of it
"""

import logging
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.mirror_folder import MirrorFolder
from llmtrain.checkpoint.retention import LINE, Keep, current, undone
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.run.directory import read_json, write_json

NOTE_FILE = "mirror.json"
"""Beside the checkpoints; holds by address what the mirror is still to be told."""

logger = logging.getLogger(__name__)


class _UndoneError(Exception):
    """The run went back while a checkpoint was copied that this undoes."""


@dataclass(frozen=True, slots=True)
class _Note:
    """A line of history that the mirror is not known to follow yet."""

    line: tuple[int, ...]
    """Steps the run has gone back to."""
    aside: bool
    """What it undoes is set aside, not deleted."""


class Mirror:
    """The copies of one run; used by one rank."""

    def __init__(
        self, url: str, keep: Keep, directory: Path | None = None, name: str | None = None
    ) -> None:
        """Copy the checkpoints of ``directory`` to the folder ``url`` and keep what ``keep`` says.

        Copies of a run that is not called ``name`` are neither fetched nor joined; null asks not.

        Raises:
            ConfigError: a package is missing, or fsspec does not know the address.
            CheckpointError: the note in ``directory`` cannot be read.
        """
        self._folder, self._keep, self._directory = MirrorFolder(url), keep, directory
        self._name = name
        self._lock = threading.Lock()
        self._note = self._read_note()
        self._beside: list[Path] = []
        self._next: Path | None = None
        self._at: Path | None = None
        self._asked = self._gone_back = False
        self._thread: threading.Thread | None = None

    @classmethod
    def of(
        cls, config: CheckpointConfig, directory: Path | None = None, name: str | None = None
    ) -> "Mirror | None":
        """The mirror of a configuration, if it has one; raises ConfigError."""
        if config.mirror is None:
            return None
        return cls(config.mirror, Keep.of(config), directory, name)

    @property
    def line(self) -> list[int]:
        """The line of history it is still to be told of; empty where there is none."""
        return [] if self._note is None else list(self._note.line)

    def start(self, path: Path | None = None) -> list[Path]:
        """Copy a checkpoint behind the training; gives those that are still needed here.

        Without one only what the run has undone is taken from the mirror.
        """
        with self._lock:
            busy = [one for one in (path, self._at) if one is not None]
            self._next, self._asked = path or self._next, True
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()
            return busy

    def forget(self, line: list[int], *, aside: bool = False) -> None:
        """Note that the run begins ``line``: what this undoes counts no longer, nor is it copied.

        The next ``start`` carries it out there. Raises OSError where it cannot be noted.
        """
        with self._lock:
            pending = self._note is not None and self._note.aside
            self._note = _Note(tuple(line), aside or pending)
            self._write_note()
            after = line[-1]
            if self._next is not None and _step(self._next) > after:
                self._next = None
            self._gone_back = self._at is not None and _step(self._at) > after

    def wait(self) -> None:
        """Wait until the newest one is there, or could not be copied."""
        if (thread := self._thread) is not None:
            logger.info("waiting for %s to have the newest checkpoint", self._folder.url)
            thread.join()

    def fetch(
        self,
        directory: Path,
        tally: archive.Tally | None = None,
        here: archive.Checkpoint | None = None,
    ) -> archive.Checkpoint | None:
        """Bring the newest whole copy to ``directory``; None where there is none.

        Of a run that has a checkpoint ``here``, only one that is ahead of it: further, or of a line
        that undoes it. ``tally`` counts what is read of the copy once it is here.

        Raises:
            CheckpointError: the mirror is another run's. It cannot be read, or none of its copies
                is whole: with one ``here`` that is a warning.
        """
        problems, url = [], self._folder.url
        try:
            for step in self._ahead(here):
                try:
                    return self._bring(step, directory, tally)
                except CheckpointError as error:
                    problems.append(str(error))
        except CheckpointError:
            raise
        except Exception as error:  # each file system has its own
            if here is None:
                raise CheckpointError(
                    f"{url} cannot be read ({error}); check network, credentials and address, or "
                    "use checkpoint.mirror=null to start from the first step"
                ) from error
            problems.append(f"it cannot be read: {error}")
        if problems and here is None:
            raise CheckpointError(f"no checkpoint in {url} is whole: {'; '.join(problems)}")
        if problems and here is not None:
            logger.warning(
                "what %s has that is newer than %s cannot be used (%s); going on from here",
                url, here.path.name, "; ".join(problems),
            )  # fmt: skip
        return None

    def keep_beside(self, path: Path) -> None:
        """Have a file of the run's folder there before the next checkpoint."""
        with self._lock:
            self._beside.append(path)

    def bring_beside(self, path: Path, digest: str) -> bool:
        """Fetch such a file to ``path``; whether there is one with this blake3.

        Raises:
            CheckpointError: the mirror cannot be read.
        """
        try:
            return self._folder.get_beside(path, digest)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder.url} cannot be read ({error}), which may have {path.name}; check "
                "network, credentials and address"
            ) from error

    def _run(self) -> None:
        while True:
            with self._lock:
                self._at = self._next
                if not self._asked:
                    self._thread = None
                    return
                path, self._next = self._next, None
                self._asked = self._gone_back = False
            followed = self._follows()
            if path is not None:
                self._copy(path, retire=followed)

    def _follows(self) -> bool:
        """Undo there what the run has undone; says where that cannot be, which is tried again."""
        try:
            while (note := self._note) is not None:
                self._undo(note)
                with self._lock:
                    if self._note is note:
                        self._note = None
                        self._write_note()
        except Exception as error:  # each file system has its own; training goes on
            logger.warning(
                "%s still has checkpoints that this run has undone (%s); it is tried again with "
                "the next checkpoint and the next start",
                self._folder.url, error,
            )  # fmt: skip
            return False
        return True

    def _undo(self, note: _Note) -> None:
        """Tell the mirror of a line; the checkpoint it goes on from comes first, which settles it.

        From then on a fetch knows the others for undone.
        """
        metas = self._folder.metas()
        for step, path in archive.scan(self._directory) if self._directory is not None else ():
            if step in metas:
                metas[step] = self._renewed(path, metas[step])
        for step in sorted(metas, reverse=True):
            if undone(step, _line(metas[step]), note.line):
                if note.aside:
                    self._folder.set_aside(step, metas[step])
                else:
                    self._folder.remove(step)

    def _renewed(self, path: Path, held: dict[str, Any]) -> dict[str, Any]:
        """Have the copy that ``held`` is of say what ``path`` says, if that is still here."""
        try:
            return archive.read_meta(path) if self._folder.renew(path, held) else held
        except (CheckpointError, FileNotFoundError):
            if path.exists():
                raise
            return held  # the rule has deleted it meanwhile

    def _copy(self, path: Path, *, retire: bool) -> None:
        try:
            while self._beside:
                self._folder.put_beside(self._beside[0])
                with self._lock:
                    self._beside.pop(0)
            self._own(self._folder.metas())
            self._folder.put(path, self._go_on)
            if retire:
                self._retire(_step(path))
            logger.info("%s has %s", self._folder.url, path.name)
        except _UndoneError:
            logger.info("%s is not copied to the end: it is undone", path.name)
        except Exception as error:  # as above
            logger.warning(
                "%s has no copy of %s (%s); the next checkpoint is tried again",
                self._folder.url, path.name, error,
            )  # fmt: skip

    def _go_on(self) -> None:
        if self._gone_back:
            raise _UndoneError

    def _ahead(self, here: archive.Checkpoint | None) -> list[int]:
        """Steps of the copies to go on from rather than from ``here``, the newest first."""
        metas = self._folder.metas()
        self._own(metas)
        lines = {step: _line(meta) for step, meta in metas.items()}
        found = {step for step in current(lines) if not undone(step, lines[step], self.line)}
        if here is not None:
            own = _line(here.meta)
            if not any(undone(here.step, own, lines[step]) for step in found):
                length = len(own)
                found = {
                    step for step in found
                    if (step, len(lines[step])) > (here.step, length)
                    and not undone(step, lines[step], own)
                }  # fmt: skip
        return sorted(found, reverse=True)

    def _own(self, metas: Mapping[int, Mapping[str, Any]]) -> None:
        """Raise CheckpointError where copies are of another run than this."""
        names = {meta.get("carried", {}).get("name", self._name) for meta in metas.values()}
        if self._name is not None and (others := sorted(names - {self._name})):
            raise CheckpointError(
                f"{self._folder.url} has the checkpoints of the run {others[0]}, this one is "
                f"{self._name}; give every run an address of its own, as "
                "'checkpoint.mirror=s3://bucket/runs/${name}'"
            )

    def _bring(self, step: int, directory: Path, tally: archive.Tally | None) -> archive.Checkpoint:
        aside = archive.fresh_aside(directory, step)
        logger.info("fetching %s from %s", archive.folder_name(step), self._folder.url)
        try:
            self._folder.get(step, aside)
            found = archive.open_checkpoint(aside, tally)
        except (OSError, CheckpointError):
            shutil.rmtree(aside, ignore_errors=True)
            raise
        final = directory / archive.folder_name(step)
        archive.install(aside, final)
        return archive.Checkpoint(final, found.meta)

    def _retire(self, newest: int) -> None:
        """Delete copies that the rule does not keep, those undone, and those cut short."""
        metas = self._folder.metas()
        whole = current({step: _line(meta) for step, meta in metas.items()})
        scores = {step: v for step in whole if (v := self._score(metas[step])) is not None}
        stay = {newest, *self._keep.kept(whole, scores)}
        for step in set(self._folder.steps()) - stay:
            self._folder.remove(step)

    def _score(self, meta: Mapping[str, Any]) -> float | None:
        score = meta.get("scores", {}).get(self._keep.metric)
        return None if score is None else float(score)

    def _read_note(self) -> _Note | None:
        path = self._noted()
        if path is None or not path.exists():
            return None
        held = read_json(path).get(self._folder.url)
        return None if held is None else _Note(tuple(held[LINE]), bool(held["aside"]))

    def _write_note(self) -> None:
        """Write what is noted for this address; that of others stays."""
        path = self._noted()
        if path is None:
            return
        held = read_json(path) if path.exists() else {}
        held.pop(self._folder.url, None)
        if self._note is not None:
            held[self._folder.url] = {LINE: list(self._note.line), "aside": self._note.aside}
        write_json(path, held)

    def _noted(self) -> Path | None:
        return None if self._directory is None else self._directory / NOTE_FILE


def _line(meta: Mapping[str, Any]) -> list[int]:
    return list(meta.get(LINE, ()))


def _step(path: Path) -> int:
    step = archive.step_of(path.name)
    return -1 if step is None else step
