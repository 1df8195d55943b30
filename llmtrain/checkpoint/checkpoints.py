"""Save and restore a run: torch Distributed Checkpoint inside the committed folders of archive.py.

Tensors are logical (full shape under one global name), so a run resumes on any layout that fits. A
save copies this rank's part of the state to host memory and goes on behind the training; at most
one is in flight to the disk, and one to the memory of the nodes (memory_copies.py). A save that
fails leaves the run and the older checkpoints as they were.

Invariant: what is written is the state at the call of ``save``: an engine that has
``before_update`` is copied while it computes gradients and waits before it changes anything, any
other state is copied before ``save`` returns.

    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, engine, facts=facts)
    checkpoints.restore(progress)              # False where there is nothing to resume
    checkpoints.save(progress)
    checkpoints.wait()                         # whether it is on disk
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtrain.checkpoint import archive, room
from llmtrain.checkpoint.history import History
from llmtrain.checkpoint.memory_copies import MemoryCopies
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.objects import (
    from_first_rank,
    gather,
    rank,
    share,
    world_size,
)
from llmtrain.checkpoint.restore import Stateful, check_facts, load_into
from llmtrain.checkpoint.resume import Find
from llmtrain.checkpoint.retention import LINE, Keep, retire
from llmtrain.checkpoint.saving import Digests, Save
from llmtrain.checkpoint.snapshot import Snapshot
from llmtrain.checkpoint.writer import Writer
from llmtrain.config.training import CheckpointConfig
from llmtrain.run.journal import RunJournal
from llmtrain.run.progress import Progress

CLOSING_S = 10.0
"""Seconds that saves in flight have to end when the run has failed."""

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run; all ranks call every method but ``close`` alike."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        engine: Stateful,
        *,
        facts: Mapping[str, str],
        journal: RunJournal | None = None,
        carried: Callable[[], Mapping[str, Any]] = dict,
        node: str | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep checkpoints of ``engine`` in ``directory``.

        ``facts`` (see facts.py) must be the same for a run to go on, or ``journal`` must accept
        what changed; ``carried`` is asked at every save on the first rank for what readers want to
        find, as the W&B id. ``node`` names this machine, null is its host name; ``beat`` is called
        while a long search goes on.
        """
        self._directory = directory
        self._config = config
        self._engine = engine
        self._facts = dict(facts)
        self._journal = journal
        self._carried = carried
        self._mirror = Mirror.of(config, directory, carried().get("name")) if rank() == 0 else None
        self._history = History(directory, self._mirror)
        self._writer = Writer(engine, directory, asynchronous=config.asynchronous)
        self._copies = (
            MemoryCopies(directory, config, node or socket.gethostname())
            if config.memory_every_steps
            else None
        )
        self._find = Find(directory, self._copies, self._mirror, beat)
        self._save: Save | None = None
        self._kept: Save | None = None
        self._saves = 0
        self._saved_step: int | None = None
        self._asked_step: int | None = None
        self._said_left_out = False
        self._failed = False
        self.save_s: float | None = None
        """Seconds the newest save took until it was on disk, on the first rank."""
        self.scores: Callable[[int], Mapping[str, float]] = lambda step: {}
        """What held-out evaluation measured at a step, for ``checkpoint.keep_best``."""
        self.guard: Callable[[], Mapping[str, Any]] = dict
        """What the guard goes on from (see guard.py)."""
        self.restored: archive.Checkpoint | None = None
        """What the run went on from; None where it began."""

    @property
    def stalled_s(self) -> float:
        """Seconds the training loop has stood still for saves so far."""
        return self._writer.stalled_s

    def due(self, progress: Progress) -> bool:
        """Whether this step is one to save after, on disk or in memory; the last always is."""
        return self._due_on_disk(progress) or self._due_in_memory(progress)

    def prepare(self) -> None:
        """Settle who writes what and take the memory for copies, so that no save has to.

        Deletes what a killed process has left.
        """
        if self._writer.file is not None:
            return
        from_first_rank(lambda: archive.clean(self._directory))
        self._writer.prepare()
        if self._copies is not None:
            self._copies.open()
            self._copies.take_room(self._writer.own_bytes)

    def check_room(self, progress: Progress) -> None:
        """Warn of a disk that is too small for what is to stay; every rank calls it, prepared.

        Raises CheckpointError on every rank alike where not even one checkpoint fits.
        """
        from_first_rank(lambda: room.check(
            self._directory, need=self._writer.all_bytes, config=self._config, step=progress.step,
            held=len(archive.scan(self._directory)), num_steps=progress.num_steps,
        ))  # fmt: skip

    def save(self, progress: Progress) -> bool:
        """Save the state after ``progress.step``; False where this or the save before has failed.

        That is said already, by the first rank. A step that is due in memory alone is kept there,
        and written to disk if it is asked for again. Saving a step twice writes it once. The answer
        is about the disk.
        """
        if progress.step in (self._saved_step, self._save and self._save.step):
            return True
        started, before = time.perf_counter(), True
        again, self._asked_step = progress.step == self._asked_step, progress.step
        self.prepare()
        to_memory = self._due_in_memory(progress) and not again
        to_disk = self._due_on_disk(progress) or not to_memory
        if to_disk:
            self._say_if_waiting()
            before = self._save is None or self._settle()
            to_disk = self._writer.has_room(progress.step)
            self._failed = self._failed or not to_disk
            before = before and to_disk
        to_memory = to_memory and not self._left_out(progress.step)
        if to_disk or to_memory:
            self._start(progress, to_disk=to_disk, to_memory=to_memory)
        if self._writer.staging is None:
            before = self._settle() and before
            self._settle_kept()
        self._writer.stood(time.perf_counter() - started)
        return before

    def wait(self) -> bool:
        """Wait for the save in flight; whether the last save that was asked for is on disk."""
        started = time.perf_counter()
        saved = self._settle()
        self._settle_kept()
        self._writer.stood(time.perf_counter() - started)
        return saved

    def wait_for_mirror(self) -> None:
        """Wait until the mirror, where there is one, has the newest checkpoint or cannot."""
        if self._mirror is not None:
            self._mirror.wait()

    def drop_memory(self) -> None:
        """Give back the memory of the nodes, once a run has ended with everything on disk."""
        if self._copies is not None:
            self._settle_kept()
            self._copies.drop()

    def close(self) -> None:
        """Let saves in flight end within a few seconds, and give the memory back.

        Runs no collective: other ranks may be gone.
        """
        saves, end = (self._save, self._kept), time.monotonic() + CLOSING_S
        self._save = self._kept = None
        late = [
            save for save in saves
            if save is not None and not save.done.wait(max(0.0, end - time.monotonic()))
        ]  # fmt: skip
        for save in late:
            save.abandon()
            logger.warning("the save of step %d was not ended in %g s", save.step, CLOSING_S)
        if self._copies is not None:
            self._copies.close()
        self._writer.close(writing=bool(late))

    def restore(self, progress: Progress) -> bool:
        """Load the newest good state and set ``progress`` to it; False where there is none.

        It comes from the memory of the nodes where that has one at least as new as the disk.
        Raises CheckpointError on every rank alike: damaged, of other data, of another model.
        """
        self._settle()
        self._settle_kept()
        found = self._find.newest(self._engine)
        if self._copies is not None and (found is None or not found.in_memory):
            self._copies.forget()
        if found is None:
            self._history.resume(None, on_disk=False)
            return False
        restored = found.checkpoint
        check_facts(restored, self._facts, self._journal)
        load_into(self._engine, found.folder)
        self._history.resume(restored, on_disk=not found.in_memory)
        self.restored = restored
        progress.step = self._asked_step = restored.step
        if self._copies is not None and found.in_memory:
            self._copies.release()
            logger.info("resumed from memory, not from disk: %s", restored.path)
        else:
            self._saved_step = restored.step
            logger.info("resumed from %s", restored.path)
        return True

    def before(self, step: int) -> archive.Checkpoint | None:
        """Find the newest good checkpoint of fewer than ``step`` steps; waits for saves in flight.

        None where there is none. Raises CheckpointError on every rank alike.
        """
        self._settle()
        return self._find.before(step)

    def go_back(self, to: archive.Checkpoint, **fields: Any) -> None:
        """Make ``to`` the newest, here and on the mirror, with other ``fields`` in its meta.json.

        The tensors are not touched; ``restore`` loads them. Raises CheckpointError on every rank.
        """
        self._forget_copies()
        self._history.go_back(to, **fields)

    def distrust(self, after: int) -> None:
        """Set aside the checkpoints of more than ``after`` steps: what they hold may be wrong.

        Raises CheckpointError on every rank.
        """
        self._settle()
        self._forget_copies()
        self._history.distrust(after)

    def keep_beside(self, path: Path) -> None:
        """Have the mirror hold a file of the run's folder, which checkpoints cannot do without."""
        if self._mirror is not None:
            self._mirror.keep_beside(path)

    def bring_beside(self, path: Path, digest: str) -> bool:
        """Fetch such a file from the mirror; whether that had it. Called on the first rank alone.

        Raises CheckpointError where the mirror cannot be read.
        """
        return self._mirror is not None and self._mirror.bring_beside(path, digest)

    def _due_on_disk(self, progress: Progress) -> bool:
        return progress.finished or progress.step % self._config.every_steps == 0

    def _due_in_memory(self, progress: Progress) -> bool:
        every, copies = self._config.memory_every_steps, self._copies
        return bool(every and copies and copies.usable and progress.step % every == 0)

    def _forget_copies(self) -> None:
        """Have no start go on from what is in memory now."""
        self._settle_kept()
        if self._copies is not None:
            self._copies.forget()

    def _left_out(self, step: int) -> bool:
        """Whether memory is passed over, since a save before is still on its way; said once."""

        def busy() -> bool:
            kept, snapshot = self._kept, self._writer.last
            in_flight = kept is not None and not kept.done.is_set()
            return in_flight or (snapshot is not None and not snapshot.free.is_set())

        told = gather((busy(), self._kept.told if self._kept is not None else None))
        left_out = told[0][0]
        if self._copies is not None and self._kept is not None:
            self._copies.give(self._kept, [part for _, part in told])
        if left_out and not self._said_left_out and rank() == 0:
            self._said_left_out = True
            logger.warning(
                "step %d is not kept in memory, a save before it is still on its way; this is not "
                "said again: raise checkpoint.memory_every_steps=%d",
                step, self._config.memory_every_steps,
            )  # fmt: skip
        if not left_out:
            self._settle_kept()
        return left_out

    def _start(self, progress: Progress, *, to_disk: bool, to_memory: bool) -> None:
        """Begin to write the state, which is copied once, to one place or two."""
        self._saves += 1
        snapshot = self._writer.snapshot(to_memory=to_memory, to_disk=to_disk)
        fields = self._fields(progress)
        if to_memory and self._copies is not None:
            self._kept = self._copies.save(
                progress.step, self._saves, fields, snapshot.write_to_memory
            )
            self._kept.start()
        if to_disk:
            self._save = self._save_of(progress.step, snapshot, fields)
            self._save.start()
        self._writer.until_taken(may_change_later=True)

    def _fields(self, progress: Progress) -> dict[str, Any]:
        """What ``meta.json`` holds besides the files."""
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "facts": self._facts,
            "journal": {} if self._journal is None else self._journal.to_plain(),
            "guard": dict(self.guard()),
            "carried": dict(self._carried()) if rank() == 0 else {},
            "scores": dict(self.scores(progress.step)),
            LINE: self._history.line,
            "world_size": world_size(),
            "torch": torch.__version__,
        }

    def _save_of(self, step: int, snapshot: Snapshot, fields: Mapping[str, Any]) -> Save:
        """Make the save to the disk."""
        aside = archive.aside_path(self._directory, step, self._saves)
        started = time.monotonic()

        def commit(save: Save, files: Digests) -> None:
            self._commit(save, aside, fields, files)
            self.save_s = time.monotonic() - started
            logger.info(
                "saved step %d in %.2f s, training stood still for %.2f s of them",
                save.step, self.save_s, snapshot.stalled_s,
            )  # fmt: skip

        return Save(
            step, aside, rank(), world_size(),
            write=lambda save: snapshot.write_to_disk(aside),
            commit=commit if rank() == 0 else None,
        )  # fmt: skip

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

    def _settle_kept(self) -> None:
        """Wait for the save to memory that is in flight."""
        kept, self._kept = self._kept, None
        if kept is not None and self._copies is not None:
            kept.written.wait()
            self._copies.give(kept, gather(kept.told))
            kept.done.wait()
