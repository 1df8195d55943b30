"""Scores from a program: any model, on any device, behind one line of JSON in and one out.

The program is started once per worker and reads a line ``{"texts": ["...", ...]}`` for every batch;
it answers with a line ``{"scores": [0.5, ...]}`` in the same order. It writes nothing else to its
standard output and ends when its input does. One that dies is started once more for the batch; one
that is silent longer than the time limit is killed with all it has started.

    CommandScorer(("python", "score.py"), time_limit_s=60).score(["Some text."])
"""

import json
import math
import os
import selectors
import shlex
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from llmtrain.errors import DataError

_ATTEMPTS = 2
_CHUNK_BYTES = 1 << 16
_SHOWN_CHARACTERS = 400


class _ProgramError(Exception):
    """What went wrong with one run of the program."""


class CommandScorer:
    """A running program that scores texts."""

    def __init__(self, command: Sequence[str], time_limit_s: float) -> None:
        """Take the program and its arguments; it is started with the first batch."""
        self._command = tuple(command)
        self._time_limit_s = time_limit_s
        self._program: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None
        self._stop: Callable[[], object] | None = None

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the score of every text.

        Raises:
            DataError: the program cannot be started, dies twice, is too slow or answers nonsense.
        """
        line = json.dumps({"texts": list(texts)}).encode() + b"\n"
        problem = ""
        for _ in range(_ATTEMPTS):
            try:
                return self._scores(self._answer(line), len(texts))
            except _ProgramError as error:
                self.close()
                problem = str(error)
        raise DataError(
            f"the program pipeline.quality.command={shlex.join(self._command)} {problem}, "
            f"{_ATTEMPTS} times; expected one line {{'scores': [...]}} for each line "
            "{'texts': [...]}: mend the program, or raise "
            f"command_time_limit_s={self._time_limit_s:g}"
        )

    def close(self) -> None:
        """Stop the program."""
        if self._stop is not None:
            self._stop()
        self._program = self._stop = None

    def _start(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """Return the program and the file its standard error goes to."""
        messages = tempfile.TemporaryFile()  # noqa: SIM115  open for as long as the program runs
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            messages.close()
            raise DataError(
                f"the program pipeline.quality.command={shlex.join(self._command)} cannot be "
                f"started ({error.strerror}); give the path of a program and its arguments"
            ) from error
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)  # type: ignore[union-attr]
        self._stop = weakref.finalize(self, _stop, process, messages)
        return process, messages

    def _answer(self, line: bytes) -> bytes:
        """Send a line and return the one that comes back."""
        deadline = time.monotonic() + self._time_limit_s
        self._program = self._program or self._start()
        process, waiting, answer = self._program[0], memoryview(line), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)  # type: ignore[arg-type]
            selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while not answer.endswith(b"\n"):
                left = deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    raise _ProgramError(f"gave no answer within {self._time_limit_s:g} s")
                for key, _ in ready:
                    if key.fileobj is process.stdout:
                        answer += self._read(key.fd)
                        continue
                    with suppress(BlockingIOError):
                        waiting = waiting[self._write(key.fd, waiting) :]
                    if not waiting:
                        selector.unregister(key.fileobj)
        return bytes(answer)

    def _write(self, handle: int, data: memoryview) -> int:
        try:
            return os.write(handle, data[:_CHUNK_BYTES])
        except BrokenPipeError:
            raise _ProgramError(self._death()) from None

    def _read(self, handle: int) -> bytes:
        data = os.read(handle, _CHUNK_BYTES)
        if not data:
            raise _ProgramError(self._death())
        return data

    def _death(self) -> str:
        """Say how the program ended and what it wrote to its standard error."""
        status, said = "no exit status", ""
        if self._program is not None:
            process, messages = self._program
            with suppress(subprocess.TimeoutExpired):
                status = f"status {process.wait(timeout=1)}"
            messages.seek(0)
            said = " ".join(messages.read().decode(errors="replace").split())
        return f"ended with {status}" + (f" ({said[-_SHOWN_CHARACTERS:]})" if said else "")

    def _scores(self, line: bytes, expected: int) -> list[float]:
        shown = line[:_SHOWN_CHARACTERS].decode(errors="replace").strip()
        try:
            answer = json.loads(line)
            scores = [float(score) for score in answer["scores"]]
        except (ValueError, KeyError, TypeError):
            raise _ProgramError(f"answered {shown!r}") from None
        if len(scores) != expected or not all(map(math.isfinite, scores)):
            raise _ProgramError(f"answered {len(scores)} scores to {expected} texts: {shown!r}")
        return scores


def _stop(process: subprocess.Popen[bytes], messages: IO[bytes]) -> None:
    """End a program and all it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for file in (process.stdin, process.stdout, messages):
        if file is not None:
            file.close()
