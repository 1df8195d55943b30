"""The folder of a run: which file is where, and JSON that is never seen half-written.

run = RunDirectory(Path("runs/demo"))
run.record(name="demo", wandb_id="3f9c21aa")   # kept when run.json is already there
run.write_status(ExitReason.DONE, step=100)
"""

import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

from llmtrain.data.manifest import sync
from llmtrain.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

_LETS_GO_S = 5.0
"""How long what a killed process was just starting may still hold its lock: until its exec."""


class ExitReason(Enum):
    """Why training ended, with the exit status it has when the run stands alone."""

    DONE = "done"
    """Every step of the run is done."""
    STOP_AT_STEP = "stop_at_step"
    """training.stop_at_step is reached and saved; the same command goes on once it is raised."""
    PREEMPTED = "preempted"
    """Asked to stop by a signal, and saved."""
    TIME_LIMIT = "time_limit"
    """The time of the process was up, and it saved."""
    SAVE_FAILED = "save_failed"
    """The checkpoint the run had to end with could not be written."""
    DIVERGED = "diverged"
    """The guard found no way on: too many updates were skipped in a row, or too many rollbacks."""
    CORRUPTED = "corrupted"
    """A search for silent corruption found some; the log names the rank."""
    ROLLED_BACK = "rolled_back"
    """The guard goes back to a checkpoint; no process ends with it."""
    PEER_LOST = "peer_lost"
    """Another rank stopped answering; nothing was saved."""
    REFUSED = "refused"
    """An input is wrong, as the message says."""
    OUT_OF_MEMORY = "out_of_memory"
    """A device had no room; the log says what to change."""
    HUNG = "hung"
    """A rank held the others up and the supervisor ended the run; see docs/monitoring.md."""
    FAILED = "failed"
    """A fault: an exception escaped."""

    @property
    def code(self) -> int:
        """Exit status: 0 done, 2 wrong input, 3 stopped and saved, 4 for a person, 1 a fault."""
        known = {
            "done": 0, "stop_at_step": 0, "refused": 2, "preempted": 3, "time_limit": 3,
            "diverged": 4, "corrupted": 4, "out_of_memory": 4, "save_failed": 4,
        }  # fmt: skip
        return known.get(self.value, 1)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run; nothing is created before it is written."""

    path: Path
    """The folder, ``runs/NAME``."""

    @property
    def config_yaml(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def run_json(self) -> Path:
        """Name and W&B id, written at the first start and kept."""
        return self.path / "run.json"

    @property
    def journal_json(self) -> Path:
        """What the run decided about its data (see data/journal.py)."""
        return self.path / "journal.json"

    @property
    def status_json(self) -> Path:
        """How the last process of the run ended: code, reason, step."""
        return self.path / "status.json"

    @property
    def lock_file(self) -> Path:
        """Locked while a process writes to the run; names that process."""
        return self.path / ".lock"

    @property
    def metrics_jsonl(self) -> Path:
        """One row per logging step."""
        return self.path / "metrics.jsonl"

    @property
    def events_jsonl(self) -> Path:
        """What happened beside the numbers, over all starts (see events.py)."""
        return self.path / "events.jsonl"

    @property
    def environment_jsonl(self) -> Path:
        """Code, versions, machines and data of every start (see provenance.py)."""
        return self.path / "environment.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of one log file per rank."""
        return self.path / "logs"

    def record(self, **fields: Any) -> dict[str, Any]:
        """Write ``run.json`` with ``fields``; a field that is already there keeps its value.

        Returns what the file holds now, so that a resumed run goes on under its first W&B id.
        """
        held = self.read_record()
        merged = {**fields, **held}
        if merged != held:
            write_json(self.run_json, merged)
        return merged

    def read_record(self) -> dict[str, Any]:
        """Read ``run.json``; empty where there is none yet."""
        return read_json(self.run_json) if self.run_json.exists() else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from this run; the kernel lets go however this one ends.

        Raises:
            ConfigError: another process holds the run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("a+", encoding="utf-8") as file:
            try:
                _lock(file)
            except BlockingIOError as error:
                file.seek(0)
                raise ConfigError(
                    f"the run {self.path} is in use by {file.read().strip() or 'another process'}; "
                    "wait for it or stop it, or start another run with name=NEW"
                ) from error
            except OSError as error:
                logger.warning("%s cannot be locked (%s); start no second process on this run",
                               self.lock_file, error.strerror)  # fmt: skip
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def done_at(self) -> int | None:
        """Step at which the last process of the run did its last step; None where it did not."""
        try:
            status = read_json(self.status_json)
        except (OSError, CheckpointError):
            return None
        return status.get("step") if status.get("reason") == ExitReason.DONE.value else None

    def _is_hung(self) -> bool:
        with suppress(OSError, CheckpointError):
            return read_json(self.status_json).get("reason") == ExitReason.HUNG.value
        return False

    def clear_status(self) -> None:
        """Forget how the process before ended; called by one rank at the start."""
        self.status_json.unlink(missing_ok=True)

    def write_status(self, reason: ExitReason, step: int) -> None:
        """Say how the run ended; called by one rank.

        A fault of a run that the supervisor is ending is that hang, which it has written already.
        """
        if reason.code == ExitReason.FAILED.code and self._is_hung():
            return
        write_json(self.status_json, {"code": reason.code, "reason": reason.value, "step": step})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` so that a reader of ``path`` sees the old file or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError where the file holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); delete it to let the run write it anew"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__}, expected an object; delete it"
        )
    return value


def _lock(file: IO[str]) -> None:
    """Lock a file that names its holder; BlockingIOError where another process has it."""
    deadline = time.monotonic() + _LETS_GO_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline or not _is_gone(file):
                raise
            time.sleep(0.02)
        else:
            return


def _is_gone(file: IO[str]) -> bool:
    """Whether the process that a lock file names was of this machine and has ended."""
    file.seek(0)
    found = re.fullmatch(r"process (\d+) on (.*)", file.read().strip())
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False
