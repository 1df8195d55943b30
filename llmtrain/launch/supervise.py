"""Watches over what starts the ranks: passes a request to stop on, and says how the run ended.

Invariant: a request to stop reaches the ranks themselves, never their launcher, which would kill
them thirty seconds later; the exit status is the run's (0 done, 2 wrong input, 3 stopped and saved,
4 a person has to act, 1 a fault), whatever the launcher makes of it.

    python -m llmtrain.launch.supervise run=runs/demo -- torchrun --nproc-per-node 2 -m llmtrain ...
"""

import ctypes
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from llmtrain import logs

logger = logging.getLogger(__name__)

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that ask a run to save and stop."""

_PR_SET_PDEATHSIG = 1
_LOOK_S = 0.1
_AGAIN_S = 5.0
"""A rank that was still starting when it was asked is asked again."""
_SELDOM_S = 60.0


@dataclass(slots=True)
class _Asked:
    """What this process was asked for."""

    stop: bool = False
    interrupts: int = 0


def supervise(
    command: Sequence[str],
    run: Path | None,
    *,
    max_restarts: int = 0,
    relay: int = signal.SIGTERM,
    tied: bool = False,
) -> int:
    """Run a command to its end and give the exit status of the run it trains.

    Args:
        command: what starts the ranks.
        run: folder of the run, whose status.json tells how it ended; None gives the command's own.
        max_restarts: starts after a fault.
        relay: signal for a command that has no ranks on this machine.
        tied: a closed standard input is a request to stop: whoever started this is gone.
    """
    with _requests() as asked:
        for restart in range(max_restarts + 1):
            before = _status(run)
            with _Child(command, relay, shielded=run is None) as child:
                while child.code() is None:
                    if tied and _closed(sys.stdin.fileno()):
                        asked.stop, tied = True, False
                    child.heed(asked)
            code = child.process.returncode
            if code < 0:
                logger.warning("%s was ended by %s", Path(command[0]).name,
                               signal.Signals(-code).name)  # fmt: skip
            status = outcome(code, run, before)
            if status != 1 or asked.stop or restart == max_restarts:
                break
            logger.warning("the run ended with a fault; start %d of %d again", restart + 1,
                           max_restarts)  # fmt: skip
    return status


def supervise_hosts(commands: Sequence[Sequence[str]], run: Path) -> int:
    """Run one command per host, each tied to this process, as one run.

    A host that fails, or a request to stop, closes the standard input of all: the supervisors
    there ask their ranks to stop.
    """
    before = _status(run)
    with _requests() as asked, ExitStack() as stack:
        hosts = [
            stack.enter_context(_Child(command, signal.SIGTERM, piped=True)) for command in commands
        ]
        while any(host.code() is None for host in hosts):
            if asked.stop or any(host.process.returncode for host in hosts):
                for host in hosts:
                    host.untie()
            for host in hosts:
                host.end(asked.interrupts)
    return outcome(next((code for host in hosts if (code := host.process.returncode)), 0), run,
                   before)  # fmt: skip


class _Child:
    """A command in a session of its own."""

    def __init__(
        self, command: Sequence[str], relay: int, shielded: bool = False, piped: bool = False
    ) -> None:
        """Start it; ``shielded`` from what batch systems send to every process; SIGINT ends it."""
        self.ending = signal.SIGINT if shielded else signal.SIGTERM
        self.process = subprocess.Popen(
            command, start_new_session=True, preexec_fn=_before_exec(shielded),
            stdin=subprocess.PIPE if piped else None,
        )  # fmt: skip
        self.relay = signal.SIGINT if shielded and relay == signal.SIGTERM else relay
        self.last_asked: float | None = None
        self.had_ranks = False
        self.pause_s = _LOOK_S
        self.look_at = time.monotonic() + self.pause_s
        self.interrupts = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.untie()
        _signal_group(self.process.pid, signal.SIGTERM)  # DeepSpeed's launcher may leave ranks

    def code(self) -> int | None:
        """Its exit status, -N for signal N; None where it still runs a moment later."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(_LOOK_S)
        return None

    def untie(self) -> None:
        """Close its standard input."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()

    def heed(self, asked: _Asked) -> None:
        """Ask its ranks to stop, again after a while; end it where Ctrl-C came twice."""
        now = time.monotonic()
        self.notice_ranks(now)
        if asked.stop and (self.last_asked is None or now - self.last_asked > _AGAIN_S):
            ranks = ranks_below(self.process.pid)
            if self.last_asked is None:
                logger.info("asking the run to save and stop; Ctrl-C once more ends it at once")
            first, self.had_ranks = self.last_asked is None, self.had_ranks or bool(ranks)
            # A launcher whose ranks have left is ending by itself.
            for pid in ranks or ([self.process.pid] if first and not self.had_ranks else []):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR1 if ranks else self.relay)
            self.last_asked = now
        self.end(asked.interrupts)

    def notice_ranks(self, now: float) -> None:
        """Note that it has started ranks, who may be gone when it is asked to stop.

        Looks at all processes, so ever more seldom.
        """
        if not self.had_ranks and now >= self.look_at:
            self.had_ranks = bool(ranks_below(self.process.pid))
            self.pause_s = min(_SELDOM_S, 1.5 * self.pause_s)
            self.look_at = now + self.pause_s

    def end(self, interrupts: int) -> None:
        """The second Ctrl-C ends the launcher, the third everything at once."""
        if interrupts > self.interrupts:
            self.interrupts = interrupts
            _signal_group(self.process.pid, self.ending if interrupts == 2 else signal.SIGKILL)


def _before_exec(shielded: bool) -> Callable[[], None]:
    """What a child does first: it is asked to end when this process is gone, however it went."""
    libc = ctypes.CDLL(None)
    ending = signal.SIGINT if shielded else signal.SIGTERM

    def prepare() -> None:
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, ending, 0, 0, 0)
        if shielded:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)

    return prepare


def outcome(code: int, run: Path | None, before: tuple[int, int] | None) -> int:
    """Exit status of a run, from that of its launcher and what the run has left.

    Args:
        code: exit status of the launcher; below 0 for a signal.
        run: folder of the run.
        before: what ``status.json`` was before the start.
    """
    now = _status(run)
    if now is not None and now != before and run is not None:
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads((run / "status.json").read_text(encoding="utf-8"))["code"])
    return code if code in (0, 2, 3, 4) else 1


def _status(run: Path | None) -> tuple[int, int] | None:
    """Which status.json is there: its inode and its time."""
    if run is None:
        return None
    try:
        os.listdir(run)  # a network file system then asks its server again
        about = (run / "status.json").stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


@contextmanager
def _requests() -> Iterator[_Asked]:
    """Note the requests instead of ending."""
    asked = _Asked()

    def note(number: int, frame: FrameType | None) -> None:
        asked.stop = True
        asked.interrupts += number == signal.SIGINT

    before = {number: signal.signal(number, note) for number in REQUESTS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _closed(descriptor: int) -> bool:
    """Whether the other end of a pipe is gone; what it wrote is thrown away."""
    readable, _, _ = select.select([descriptor], [], [], 0)
    return bool(readable) and os.read(descriptor, 4096) == b""


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def ranks_below(pid: int) -> list[int]:
    """The topmost processes below ``pid`` that a launcher gave a rank."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            after_name = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
            children.setdefault(int(after_name.split()[1]), []).append(int(path.parent.name))
    found, queue = list[int](), list(children.get(pid, []))
    while queue:
        process = queue.pop()
        if _has_rank(process):
            found.append(process)
        else:
            queue += children.get(process, [])
    return sorted(found)


def _has_rank(pid: int) -> bool:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(b"RANK=") for entry in content.split(b"\0"))


def arguments(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take ``key=value ... -- rest`` apart."""
    if "--" not in words:
        return dict(word.split("=", 1) for word in words), []
    end = list(words).index("--")
    return dict(word.split("=", 1) for word in words[:end]), list(words[end + 1 :])


def main(words: Sequence[str]) -> int:
    """Supervise the command after ``--``."""
    logs.setup(None)
    given, command = arguments(words)
    return supervise(
        command,
        Path(given["run"]) if "run" in given else None,
        relay=signal.Signals[given.get("relay", "SIGTERM")],
        tied=given.get("tied") == "true",
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
