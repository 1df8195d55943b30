"""The state of one step on its way out of this rank: copied once, written to memory, disk or both.

Invariant: what is written is the state at the moment the snapshot was made, provided that nothing
changes it before ``taken`` is set, nor makes another snapshot before ``free`` is set.

    snapshot = Snapshot(state, file, index, staging, to_memory=True, to_disk=True)
    snapshot.write_to_memory(aside)     # in one thread
    snapshot.write_to_disk(aside)       # in another
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from llmtrain.checkpoint import tensor_files
from llmtrain.checkpoint.memory_folder import copy_out
from llmtrain.checkpoint.saving import Digests
from llmtrain.checkpoint.staging import Staging
from llmtrain.checkpoint.tensor_files import INDEX, RankFile


class Snapshot:
    """One state; each of the two ``write`` methods that it was made for is called once."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        file: RankFile,
        index: bytes,
        staging: Staging | None,
        *,
        to_memory: bool,
        to_disk: bool,
    ) -> None:
        """Mark the point in the work of the GPU at which ``state`` is what is to be written.

        ``index`` is empty but on the rank that writes it. Without ``staging`` it is written from
        the state itself.
        """
        self.taken, self.free = threading.Event(), threading.Event()
        self.stalled_s = 0.0
        """Seconds the training loop stood still for it."""
        self._state, self._file, self._index = state, file, index
        self._staging = staging
        self._ready = None if staging is None else staging.ready()
        self._to_memory, self._to_disk = to_memory, to_disk
        self._kept = threading.Event()
        self._source: BinaryIO | None = None
        self._digests: Digests = {}

    def write_to_memory(self, aside: Path) -> Digests:
        """Write this rank's files to a folder in memory; raises OSError."""
        try:
            self._digests = self._write(aside)
            if self._to_disk:  # this outlives the folder's name, and the folder
                self._source = (aside / self._file.name).open("rb")
            return self._digests
        finally:
            self._kept.set()
            if self._source is not None or not self._to_disk:
                self._release()

    def write_to_disk(self, aside: Path) -> Digests:
        """Write this rank's files to the folder on disk; raises OSError."""
        try:
            if self._to_memory:
                self._kept.wait()
            if self._source is None:
                return self._write(aside)
            with self._source as source:
                aside.mkdir(parents=True, exist_ok=True)
                name = self._file.name
                files = {name: copy_out(source, aside / name, self._digests[name])}
                return files | self._write_index(aside)
        finally:
            self._release()

    def _write(self, aside: Path) -> Digests:
        pieces, staging = self._file.pieces, self._staging
        if staging is not None and not self.taken.is_set():
            staging.copy(self._state, self._ready)
            self._state = {}
            self.taken.set()
        aside.mkdir(parents=True, exist_ok=True)
        values = staging.values if staging else (piece.on_host(self._state) for piece in pieces)
        written = tensor_files.write(aside / self._file.name, pieces, values)
        return {self._file.name: written} | self._write_index(aside)

    def _write_index(self, aside: Path) -> Digests:
        if not self._index:
            return {}
        return {INDEX: tensor_files.write_bytes(aside / INDEX, [self._index])}

    def _release(self) -> None:
        self._state = {}
        self.taken.set()
        self.free.set()
