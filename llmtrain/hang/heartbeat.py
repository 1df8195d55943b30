"""Where a rank is: step, phase and micro-batch in a few words of memory that others can read.

Invariant: a beat is two stores and a clock; it makes no system call and never waits for a device.
Until ``open`` the words are private. This module imports no torch.

    beat = Heartbeat()
    beat.open(folder / "rank-3", rank=3)        # from now on another process sees it
    beat.begin(step=12, slow=False)
    beat.at(Phase.FORWARD, 2)                   # micro-batch 2
    with beat.waiting:                          # for peers
        work.wait()
    read_beat(folder / "rank-3").sentence       # step 12, forward of micro-batch 2
"""

import mmap
import os
import threading
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from time import monotonic_ns
from types import TracebackType

_SIZE_BYTES = 128
_PID, _STARTED, _MAIN, _STEP, _STATE, _SINCE, _ALIVE, _ASKED, _RANK = range(9)
_MICROBATCH, _SLOW = 8, 1 << 40
_READY = 15


class Phase(IntEnum):
    """What the main thread of a rank does."""

    START = 0
    """Builds the model, meets the others, reads a checkpoint."""
    DATA = 1
    """Waits for its own batch."""
    FORWARD = 2
    """Computes a forward."""
    BACKWARD = 3
    """Computes a backward; sharded parameters are gathered and reduced inside."""
    COLLECTIVE = 4
    """Waits for peers: a sum, an agreement, a message of the pipeline."""
    OPTIMIZER = 5
    """Updates."""
    OBSERVE = 6
    """Between the update and the next batch: rows, events."""
    EVALUATE = 7
    """Scores held-out data."""
    SAVE = 8
    """Stands still for a checkpoint."""
    DONE = 9
    """Has left training; nothing is expected of it."""


class Heartbeat:
    """What one rank says of itself; written by its main thread, ``live`` by a thread beside it."""

    def __init__(self) -> None:
        """Say it to nobody."""
        self._words = memoryview(bytearray(_SIZE_BYTES)).cast("q")
        self._map: mmap.mmap | None = None
        self._slow = 0
        self.waiting = _Waiting(self)
        """Context of a wait for peers; the phase before it goes on after it."""

    def open(self, path: Path, rank: int) -> None:
        """Say it in the file ``path`` from now on; OSError where there is no room for it."""
        with path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, _SIZE_BYTES)  # a hole would be a SIGBUS later
            self._map = mmap.mmap(file.fileno(), _SIZE_BYTES)
        words = memoryview(self._map).cast("q")
        words[:] = self._words
        words[_RANK], words[_PID], words[_STARTED] = rank, os.getpid(), start_ticks(os.getpid())
        words[_MAIN] = threading.main_thread().ident or 0
        words[_SINCE] = words[_ALIVE] = monotonic_ns()
        words[_READY] = 1
        self._words = words

    def close(self) -> None:
        """Say that nothing more is to be expected, and be private again."""
        self.at(Phase.DONE)
        words, self._words = self._words, memoryview(bytearray(_SIZE_BYTES)).cast("q")
        if self._map is not None:
            words.release()
            self._map.close()
            self._map = None

    def begin(self, step: int, slow: bool) -> None:
        """Begin with the batch of ``step``, counted from 1; ``slow`` where it may take longer."""
        self._words[_STEP] = step
        self.at(Phase.DATA, slow=slow)

    def at(self, phase: int, microbatch: int = 0, slow: bool | None = None) -> None:
        """Be in ``phase``, of a micro-batch counted from 1; ``slow`` holds until it is given anew.

        A slow step may take longer.
        """
        words = self._words
        if slow is not None:
            self._slow = _SLOW if slow else 0
        words[_STATE] = phase | microbatch << _MICROBATCH | self._slow
        words[_SINCE] = monotonic_ns()

    def live(self) -> bool:
        """Say that this process runs; whether the supervisor asks for a flight record."""
        words = self._words
        words[_ALIVE] = monotonic_ns()
        asked = bool(words[_ASKED])
        words[_ASKED] = 0
        return asked


class _Waiting:
    """Reused for every wait: the state before is put back."""

    __slots__ = ("_beat", "_before")

    def __init__(self, beat: Heartbeat) -> None:
        self._beat = beat
        self._before = 0

    def __enter__(self) -> None:
        words = self._beat._words
        if words[_STATE] & 0xFF != Phase.COLLECTIVE:
            self._before = words[_STATE]
        words[_STATE] = self._before & ~0xFF | Phase.COLLECTIVE
        words[_SINCE] = monotonic_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        words = self._beat._words
        words[_STATE] = self._before
        words[_SINCE] = monotonic_ns()


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank said last."""

    rank: int
    """Its number."""
    pid: int
    """Its process."""
    started: int
    """Clock ticks from boot to the start of that process, which tell it from a later one."""
    main_thread: int
    """Its main thread, as Python numbers it."""
    step: int
    """Step it works on, from 1; 0 before the first."""
    phase: Phase
    """What it does."""
    microbatch: int
    """Of which micro-batch, from 1; 0 where none is meant."""
    slow: bool
    """Whether this may take longer: the first step of a shape compiles."""
    since_ns: int
    """When it said so, on the machine's monotonic clock."""
    alive_ns: int
    """When its liveness thread last ran, on that clock."""

    @property
    def sentence(self) -> str:
        """Where it is, in words."""
        of = f" of micro-batch {self.microbatch}" if self.microbatch else ""
        return f"step {self.step}, {self.phase.name.lower()}{of}"


def read_beat(path: Path) -> Beat | None:
    """What the rank behind ``path`` said last; None where it has not begun."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(content) < _SIZE_BYTES:
        return None
    words = memoryview(content).cast("q")
    if not words[_READY]:
        return None
    state = words[_STATE]
    return Beat(
        rank=words[_RANK], pid=words[_PID], started=words[_STARTED], main_thread=words[_MAIN],
        step=words[_STEP], phase=Phase(state & 0xFF), slow=bool(state & _SLOW),
        microbatch=(state & (_SLOW - 1)) >> _MICROBATCH,
        since_ns=words[_SINCE], alive_ns=words[_ALIVE],
    )  # fmt: skip


def ask_for_record(path: Path) -> None:
    """Ask the rank behind ``path`` to write its flight record."""
    with path.open("r+b") as file:
        file.seek(8 * _ASKED)
        file.write((1).to_bytes(8, "little"))


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is no such process."""
    return int(_stat(pid)[19] if _stat(pid) else 0)


def process_state(pid: int, started: int) -> str:
    """Letter of /proc/PID/stat (T stopped, D on the disk, Z ended ...); X where it is gone."""
    fields = _stat(pid)
    return fields[0] if fields and int(fields[19]) == started else "X"


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
