"""Copies of the training state in the host memory of the nodes, each held by two of them.

Every node keeps the files of its ranks and those of the node before it, in the format of a
checkpoint on disk. A copy is whole where the nodes together hold all of its files; a node that
lacks some gets them from another when it reads.

Invariant: a copy counts only under the mark in the run's folder (``checkpoints/memory.json``).
Going back, or going on from the disk, makes a new mark first, so no copy outlives what undid its
steps, not even one on a node that is away. The copy before goes once all nodes have the newest.

    copies = MemoryCopies(run.checkpoints, config.checkpoint, socket.gethostname())
    copies.open()                                   # whether there can be any
    copies.save(step, attempt, fields, write).start()
    copies.newest(at_least=0, files_of=...)         # where to read it on this node
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.checkpoint import archive, room
from llmtrain.checkpoint.memory_folder import MARK, Held, MemoryFolder
from llmtrain.checkpoint.node_links import Links
from llmtrain.checkpoint.nodes import Nodes
from llmtrain.checkpoint.objects import from_first_rank, gather, rank
from llmtrain.checkpoint.saving import Digests, Part, Save
from llmtrain.checkpoint.tensor_files import INDEX
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.run.directory import read_json, write_json

MARK_FILE = "memory.json"
"""Holds the mark, beside the checkpoints."""
_PHASES = ("written", "committed")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy whose files are all somewhere."""

    step: int
    """Steps done when it was written."""
    meta: Mapping[str, Any]
    """What its ``meta.json`` holds on every node."""
    holders: dict[str, list[int]]
    """Nodes by name of file."""


class MemoryCopies:
    """The copies of one run; all ranks call every method alike, but ``drop`` and ``close``."""

    def __init__(self, directory: Path, config: CheckpointConfig, node: str) -> None:
        """Keep copies of the run with the checkpoints ``directory``; this machine is ``node``."""
        self._directory = directory
        self._every_steps = config.memory_every_steps
        self._folder = MemoryFolder(Path(config.memory_dir), directory, node)
        self._node = node
        self._nodes: Nodes | None = None
        self._links: Links | None = None
        self._mark = ""
        self._bad: set[int] = set()
        self._warned = False
        self.usable = False
        """Whether copies are made; once opened."""

    def open(self) -> None:
        """Meet the other nodes, once; where copies cannot be, that is said."""
        if self._nodes is not None:
            return
        nodes = self._nodes = Nodes.meet(self._node)
        problem, offer = "", None
        if nodes.is_leader:
            try:
                self._folder.make()
                self._links = Links(self._folder.path)
                offer = self._links.offer
            except OSError as error:
                problem = f"{self._node}: {error}"
        told = gather((problem, offer))
        problem = next((problem for problem, _ in told if problem), "")
        if self._links is not None and not problem:
            self._links.join([told[ranks[0]][1] or {} for ranks in nodes.ranks], nodes.here)
            try:
                self._links.reach(0)
                self._links.reach(nodes.keeper)
            except CheckpointError as error:
                problem = f"{self._node} reaches no other node: {error}"
        problem = next((one for one in gather(problem) if one), "")
        self._mark, unmarked = from_first_rank(self._known_mark)
        self._begin_or_say(problem or unmarked)

    def take_room(self, num_bytes: int) -> None:
        """Look for the room that copies need, of which this rank writes ``num_bytes``."""
        nodes = self._known_nodes()
        sizes = gather(num_bytes)
        held = [sum(sizes[rank] for rank in ranks) for ranks in nodes.ranks]
        need = 2 * (held[nodes.here] + (held[nodes.kept] if nodes.count > 1 else 0))
        problem = self._lack(need) if nodes.is_leader and self.usable else ""
        problem = next((one for one in gather(problem) if one), "")
        if problem and self.usable:
            self.usable = False
            self._say_without(problem)

    def save(
        self,
        step: int,
        attempt: int,
        fields: Mapping[str, Any],
        write: Callable[[Path], Digests],
    ) -> Save:
        """Make the save of a step, which ``write`` writes; ``fields`` count on the first rank."""
        nodes = self._known_nodes()
        aside = archive.aside_path(self._folder.path, step, attempt)
        round_ = _Round(self._links, nodes, f"{attempt}")

        def write_anew(save: Save) -> Digests:
            if nodes.is_leader:
                self._folder.clean(but=aside.name)
            return write(aside)

        def commit(save: Save, files: Digests) -> None:
            self._commit(save, round_, files, fields)

        def failed(save: Save) -> None:
            round_.give_up(str(save.problem))
            if rank() == 0:
                self._say_failed(save)

        return Save(
            step, aside, nodes.mine.index(rank()), len(nodes.mine), write=write_anew,
            commit=commit if nodes.is_leader else None, failed=failed,
        )  # fmt: skip

    def give(self, save: Save, parts: Sequence[Part | None]) -> None:
        """Hand a save the parts of all ranks; where one is not written yet, nothing is handed in.

        In a full memory ranks cannot tell by files.
        """
        mine = [part for rank in self._known_nodes().mine if (part := parts[rank]) is not None]
        if len(mine) == len(self._known_nodes().mine):
            save.give(mine)

    def newest(
        self, at_least: int, files_of: Callable[[Path], set[str]]
    ) -> tuple[archive.Checkpoint, Path] | None:
        """Find the newest whole copy of at least so many steps, and the folder to read it from.

        ``files_of`` tells what this rank reads, from a folder that holds the index; it may call
        collectives and raise CheckpointError on all ranks. The folder is there until ``forget``,
        ``release`` or the next save.
        """
        nodes = self._known_nodes()
        while True:
            found = gather(self._folder.held(self._mark) if nodes.is_leader else [])
            held = [found[ranks[0]] for ranks in nodes.ranks]
            copy = self._choose(held, at_least)
            if copy is None:
                return None
            view = self._folder.view(copy.step)
            problem = self._collect(view, copy, {INDEX})
            if not problem:
                wanted = gather(files_of(view))
                problem = self._collect(view, copy, set().union(*(wanted[r] for r in nodes.mine)))
            if not problem:
                path = self._folder.path / archive.folder_name(copy.step)
                return archive.Checkpoint(path, dict(copy.meta)), view
            self._bad.add(copy.step)
            logger.warning(
                "the copy of step %d in memory cannot be used (%s); going on from an older one",
                copy.step, problem,
            )  # fmt: skip

    def release(self) -> None:
        """Let go of what was gathered to be read, once all ranks have read it."""
        gather(None)
        if self._known_nodes().is_leader:
            self._folder.clean()

    def forget(self) -> None:
        """Let no copy made so far count any more, wherever it is, and delete those at hand.

        Raises CheckpointError on every rank where the run's folder cannot be written to.
        """
        self._mark = from_first_rank(self._new_mark)
        self._bad.clear()
        if self._known_nodes().is_leader:
            self._folder.retire(-1)
        gather(None)

    def drop(self) -> None:
        """Give this node's memory back; at the end of a run, of which all is on disk."""
        if self._nodes is not None and self._nodes.is_leader:
            with suppress(OSError):
                self._folder.clear()

    def close(self) -> None:
        """Serve no other node any longer."""
        if self._links is not None:
            self._links.close()

    def _known_nodes(self) -> Nodes:
        if self._nodes is None:
            raise RuntimeError("open() comes first")
        return self._nodes

    def _known_mark(self) -> tuple[str, str]:
        """The run's mark, or why it has none."""
        path = self._directory / MARK_FILE
        try:
            return (str(read_json(path)[MARK]), "") if path.exists() else (self._new_mark(), "")
        except (CheckpointError, OSError, KeyError) as error:
            return "", str(error)

    def _new_mark(self) -> str:
        mark = secrets.token_hex(16)
        try:
            write_json(self._directory / MARK_FILE, {MARK: mark})
        except OSError as error:
            raise CheckpointError(f"{self._directory} cannot be written to: {error}") from error
        return mark

    def _begin_or_say(self, problem: str) -> None:
        nodes = self._known_nodes()
        self.usable = not problem
        if problem:
            self._say_without(problem)
        elif nodes.count == 1:
            logger.info(
                "copies in memory are on one node, %s: they outlive its processes, not the node",
                self._node,
            )  # fmt: skip

    def _say_without(self, problem: str) -> None:
        logger.warning(
            "checkpoint.memory_every_steps=%s: %s; the run goes on without copies in memory: make "
            "room (mount -o remount,size=..., docker --shm-size), set checkpoint.memory_dir to "
            "another memory, or use checkpoint.memory_every_steps=null",
            self._every_steps, problem,
        )  # fmt: skip

    def _say_failed(self, save: Save) -> None:
        level = logging.INFO if self._warned else logging.WARNING
        self._warned = True
        logger.log(
            level,
            "the state of step %d is not kept in memory (%s); the run goes on with older copies: "
            "make room in %s, or use checkpoint.memory_every_steps=null",
            save.step, save.problem, self._folder.path.parents[1],
        )  # fmt: skip

    def _lack(self, need: int) -> str:
        """What this node lacks of ``need`` bytes, those that are held now included."""
        try:
            free = room.free_memory_bytes(self._folder.path) + self._folder.num_bytes()
        except OSError as error:
            return f"{self._node}: {error}"
        if free >= need:
            return ""
        return (
            f"{self._node} has room for {free:,} bytes in {self._folder.path.parents[1]}, the "
            f"newest copy and the one in the making need {need:,}"
        )

    def _commit(
        self, save: Save, round_: "_Round", files: Digests, fields: Mapping[str, Any]
    ) -> None:
        """On the first rank of a node: hand a copy over, and commit when all nodes have done so."""
        nodes, started = self._known_nodes(), time.monotonic()
        round_.hand_over(save.aside, files)
        parts = round_.agree("written", {"files": files, "fields": dict(fields)})
        merged = {name: record for part in parts for name, record in part["files"].items()}
        archive.commit(
            save.aside, {**parts[0]["fields"], MARK: self._mark}, merged,
            here={*files, *parts[nodes.kept]["files"]},
        )  # fmt: skip
        round_.agree("committed", {})
        self._folder.retire(save.step)
        logger.debug("step %d is in memory after %.3f s", save.step, time.monotonic() - started)

    def _choose(self, held: Sequence[Sequence[Held]], at_least: int) -> Copy | None:
        """The newest copy that is whole; says what newer ones lack."""
        found: dict[tuple[int, str], Copy] = {}
        for node, copies in enumerate(held):
            for one in copies:
                if one.step < at_least or one.step in self._bad:
                    continue
                key = (one.step, json.dumps(one.meta, sort_keys=True))
                copy = found.setdefault(key, Copy(one.step, one.meta, {}))
                for name in one.names:
                    copy.holders.setdefault(name, []).append(node)
        for _, copy in sorted(found.items(), reverse=True):
            lacking = sorted(copy.meta["files"].keys() - copy.holders.keys())
            if not lacking:
                return copy
            self._bad.add(copy.step)
            logger.warning(
                "no node has %s of step %d in memory: going on from an older state",
                " and ".join(lacking[:3]), copy.step,
            )  # fmt: skip
        return None

    def _collect(self, view: Path, copy: Copy, names: Collection[str]) -> str:
        """Have good files of a copy in ``view`` on every node; says what is in the way."""
        problem = ""
        if self._known_nodes().is_leader:
            try:
                view.mkdir(exist_ok=True)
                with ThreadPoolExecutor(max_workers=4) as pool:
                    list(pool.map(lambda name: self._bring(view, copy, name), sorted(names)))
            except (OSError, CheckpointError) as error:
                problem = f"{self._node}: {error}"
        return next((one for one in gather(problem) if one), "")

    def _bring(self, view: Path, copy: Copy, name: str) -> None:
        """Put a file into ``view``: the one that is here, or that of another node."""
        target, here = view / name, self._known_nodes().here
        folder = self._folder.path / archive.folder_name(copy.step)
        record, own = copy.meta["files"][name], folder / name
        if target.exists():
            return
        if here in copy.holders[name]:
            if archive.digests(folder, [name])[name] == record:
                os.link(own, target)
                return
            logger.warning("%s does not match its checksum", own)
            own.unlink()
        for node in copy.holders[name]:
            if node != here and self._links is not None:
                with suppress(CheckpointError):
                    self._links.get(node, folder.name, target, record)
                    logger.info("%s of step %d came from node %s", name, copy.step,
                                self._known_nodes().names[node])  # fmt: skip
                    return
        raise CheckpointError(f"{name} is damaged wherever it is")


class _Round:
    """One save on the first rank of a node: what it has told the others so far."""

    def __init__(self, links: Links | None, nodes: Nodes, key: str) -> None:
        self._links, self._nodes, self._key = links, nodes, key
        self._told: set[str] = set()

    def hand_over(self, aside: Path, files: Digests) -> None:
        """Send this node's files to the one that keeps a copy."""
        if self._links is not None and self._nodes.count > 1:
            for name, record in sorted(files.items()):
                self._links.put(self._nodes.keeper, aside.name, aside / name, record)

    def agree(self, phase: str, value: Mapping[str, Any]) -> list[Any]:
        """Wait for all nodes; raises CheckpointError with the problem of any."""
        if self._links is None:
            raise RuntimeError("the first rank of a node has links")
        self._told.add(phase)
        parts = self._links.exchange(f"{self._key} {phase}", value)
        for name, part in zip(self._nodes.names, parts, strict=True):
            if "problem" in part:
                raise CheckpointError(f"{name}: {part['problem']}")
        return parts

    def give_up(self, problem: str) -> None:
        """Tell the nodes that wait for this one."""
        for phase in _PHASES:
            if self._links is not None and phase not in self._told:
                with suppress(CheckpointError):
                    self._links.exchange(f"{self._key} {phase}", {"problem": problem}, wait=False)
