"""What a rank does for the supervisor of its machine (llmtrain/hang): beat, live, show its stacks.

The first rank of a machine starts the supervisor, so that it is there however the ranks were
started: by llmtrain launch, torchrun, Slurm or by hand. It gets no torch and no file of this
process, and ends with the ranks.

Invariant: a run goes on as if this were not there where it cannot be set up.

    watchdog = stack.enter_context(Watchdog(config.monitor, run, world, timeout_s=600.0))
    watchdog.listener = tell       # rank 0 hears what the supervisor says of a hang
"""

import faulthandler
import json
import logging
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import orjson
import torch

import llmtrain
from llmtrain.config.training import MonitorConfig
from llmtrain.hang.heartbeat import Phase
from llmtrain.hang.job import Job, beat_path, record_path
from llmtrain.hang.stacks import SIGNAL, stack_path
from llmtrain.parallel.mesh import World
from llmtrain.run.directory import RunDirectory

logger = logging.getLogger(__name__)

_MEMORY = Path("/dev/shm")
_BEAT_S = 1.0
_SLOW_SHARE = 0.9
"""Of the collectives' time-out: the culprit of a slow phase is named before that ends its peers."""

_START = "import sys; sys.path[:0] = sys.argv[1:3]; " \
    "from llmtrain.hang.supervisor import main; raise SystemExit(main(sys.argv[3:]))"  # fmt: skip
"""Two folders instead of all that ``site`` looks through: this package's, and orjson's."""


class Watchdog(AbstractContextManager["Watchdog"]):
    """Opens the heartbeat of a rank, and on the first of a machine starts the supervisor."""

    def __init__(
        self, config: MonitorConfig, run: RunDirectory, world: World, timeout_s: float
    ) -> None:
        """Watch the ranks of ``world``; ``timeout_s`` is that of its collectives."""
        self._config = config
        self._run = run
        self._world = world
        self._timeout_s = timeout_s
        self._over = threading.Event()
        self._stack = ExitStack()
        self.listener: Callable[[str], None] = lambda text: None
        """Told on rank 0 of a hang, in one sentence that the console and the events have."""

    def __enter__(self) -> "Watchdog":
        """Begin to beat; every rank calls it alike."""
        if self._config.hang_s is None or not sys.platform.startswith("linux"):  # it reads /proc
            return self
        token = self._world.share(secrets.token_hex(8), source=0)
        place = self._world.place
        parent = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
        folder = parent / f"llmtrain-{token}-{place.rank - place.local_rank}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._world.beat.open(beat_path(folder, place.rank), place.rank)
            self._show_stacks(folder)
            if place.local_rank == 0:
                self._start_supervisor(folder, self._config.hang_s, token)
        except OSError as error:
            logger.warning("hangs of this run are not noticed (%s)", error)
        thread = threading.Thread(target=self._live, args=(folder,), name="heartbeat", daemon=True)
        thread.start()
        self._stack.callback(thread.join)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Expect nothing more of this rank."""
        self._over.set()
        self._world.beat.at(Phase.DONE)
        self._stack.close()
        self._world.beat.close()

    def _show_stacks(self, folder: Path) -> None:
        """Write the stacks of all threads on SIGUSR2, whatever the main thread does."""
        file = self._stack.enter_context(stack_path(folder, self._world.rank).open("w"))
        faulthandler.register(SIGNAL, file=file, all_threads=True)
        self._stack.callback(faulthandler.unregister, SIGNAL)

    def _live(self, folder: Path) -> None:
        """Show that this process runs; write the flight record when asked."""
        while not self._over.wait(_BEAT_S):
            if self._world.beat.live():
                with suppress(OSError):
                    path = record_path(folder, self._world.rank)
                    beside = path.with_suffix(".part")
                    beside.write_bytes(flight_record())
                    beside.replace(path)

    def _start_supervisor(self, folder: Path, hang_s: float, token: str) -> None:
        place, world_size = self._world.place, self._world.world_size
        slow_s = max(hang_s, _SLOW_SHARE * self._timeout_s) if world_size > 1 else float("inf")
        job = Job(
            beats=folder, start=token, run=self._run.path.absolute(), first_rank=place.rank,
            num_ranks=min(place.local_world_size, world_size), world_size=world_size,
            host=socket.gethostname(), deadline_s=hang_s, slow_s=slow_s,
            ends=self._config.hang_action == "end",
        )  # fmt: skip
        roots = [str(Path(module.__file__ or "").parents[1]) for module in (llmtrain, orjson)]
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START, *roots, json.dumps(job.plain)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            cwd="/",
        )  # fmt: skip
        self._stack.callback(_part, process)
        if process.stdout is not None:
            hears = threading.Thread(
                target=self._hear, args=(process.stdout,), name="supervisor", daemon=True
            )
            hears.start()

    def _hear(self, said: IO[str]) -> None:
        with said:
            for line in said:
                logger.error("%s", line.rstrip("\n"), extra={"file_only": True})
                self.listener(line.rstrip("\n"))


def flight_record() -> bytes:
    """The last collectives of this process, as JSON, where torch has recorded any.

    NCCL's are by default; gloo's are where TORCH_FR_BUFFER_SIZE is above 0.
    """
    dump: Callable[..., bytes | str] | None = getattr(
        torch._C._distributed_c10d, "_dump_fr_trace_json", None
    )
    found = b"{}" if dump is None else dump()
    return found.encode() if isinstance(found, str) else bytes(found)


def _part(process: "subprocess.Popen[str]") -> None:
    """Tell the supervisor that this rank leaves; it ends once the others of the machine have.

    What was started here has ended long ago: the supervisor is its child, and outlives this rank.
    """
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()
    process.wait()
