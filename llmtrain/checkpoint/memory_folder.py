"""The folder of a run in the host memory of one node: found again by a process that starts there.

``/dev/shm/llmtrain-copies-UID-RUN-HASH/NODE/step-000000100/`` holds the files of the node's ranks,
those it keeps for another node, and a ``meta.json`` that lists the files of all nodes. The hash is
that of the run folder's path.

Invariant: only this user can have made what is read; what is not whole has no ``meta.json``.

    folder = MemoryFolder(Path("/dev/shm"), run.checkpoints, "node-a")
    folder.make()
    folder.held(mark)
"""

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3

from llmtrain.checkpoint import archive
from llmtrain.data.manifest import sync
from llmtrain.errors import CheckpointError

MARK = "mark"
"""Field of ``meta.json`` that ties a copy to its run folder (see memory_copies.py)."""
_VIEW = "reading"
_COPY_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Held:
    """What one node has of a step."""

    step: int
    """Steps done when it was written."""
    meta: Mapping[str, Any]
    """Of the whole, as in a checkpoint on disk."""
    names: Collection[str]
    """Files that are there, in their size."""


class MemoryFolder:
    """Copies on this node; only its first rank changes them."""

    def __init__(self, root: Path, directory: Path, node: str) -> None:
        """Use the folder below ``root`` for the run whose checkpoints lie in ``directory``."""
        whole = str(directory.resolve())
        name = re.sub(r"[^\w.-]", "_", directory.resolve().parent.name)
        key = blake3(whole.encode()).hexdigest()[:12]
        self._run = root / f"llmtrain-copies-{os.geteuid()}-{name}-{key}"
        self.path = self._run / re.sub(r"[^\w.-]", "_", node)

    def make(self) -> None:
        """Make the folder, and delete what was never committed.

        Raises:
            OSError: it cannot be made, or is of another user.
        """
        for path in (self._run, self.path):
            path.mkdir(mode=0o700, parents=path == self._run, exist_ok=True)
            about = path.lstat()
            if about.st_uid != os.geteuid() or about.st_mode & 0o077 or path.is_symlink():
                raise PermissionError(f"{path} is open to other users; delete it")
        self.clean()

    def held(self, mark: str) -> list[Held]:
        """List the copies with ``mark``, newest first, and delete all others."""
        found = []
        for step, path in archive.scan(self.path):
            try:
                meta = archive.read_meta(path)
            except (OSError, CheckpointError):
                meta = {}
            if meta.get(MARK) != mark:
                archive.remove(path)
                continue
            names = [name for name, r in meta["files"].items() if _has(path / name, r["bytes"])]
            found.append(Held(step, meta, names))
        return found

    def num_bytes(self) -> int:
        """Bytes of the copies that are there."""
        return sum(
            file.stat().st_size for _, path in archive.scan(self.path) for file in path.iterdir()
        )

    def view(self, step: int) -> Path:
        """Where the files of a step are gathered to be read."""
        return archive.aside_path(self.path, step).with_suffix(f".{_VIEW}")

    def retire(self, newest: int) -> None:
        """Delete the copies of other steps than ``newest``."""
        for step, path in archive.scan(self.path):
            if step != newest:
                archive.remove(path)

    def clean(self, but: str = "") -> None:
        """Delete what was never committed, the folder named ``but`` excepted."""
        for left in self.path.glob(".*"):
            if left.name != but:
                shutil.rmtree(left, ignore_errors=True)

    def clear(self) -> None:
        """Delete everything of the run on this node."""
        for _, path in archive.scan(self.path):
            archive.remove(path)
        shutil.rmtree(self.path, ignore_errors=True)
        if self._run.is_dir() and not any(self._run.iterdir()):
            self._run.rmdir()


def copy_out(source: BinaryIO, target: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Write and sync a copy of an open file whose ``record`` is known, which is returned.

    Raises:
        OSError: it could not be written; what was, is deleted.
    """
    try:
        with target.open("wb") as file:
            done = 0
            while count := os.sendfile(file.fileno(), source.fileno(), done, _COPY_BYTES):
                done += count
            os.fsync(file.fileno())
        sync(target.parent)
        if done != record["bytes"]:
            raise OSError(f"{done:,} of {record['bytes']:,} bytes of {target.name} were copied")
    except OSError:
        target.unlink(missing_ok=True)
        raise
    return dict(record)


def _has(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False
