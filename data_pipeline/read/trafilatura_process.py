"""Text of HTML by trafilatura, in a process that is killed when a page takes too long.

trafilatura can run for ever on a page. A page that took more than the limit of processor time (not
of wall time, so that a busy machine decides the same) is dropped as ``extract.timed_out``, one on
which the process dies twice as ``extract.crashed``, one on which it raises as ``extract.failed``.
The text of a page does not depend on the pages before it.

    with TrafilaturaProcess(TrafilaturaConfig()) as trafilatura:
        trafilatura.text_of("<p>Hello there.</p>")
"""

import importlib.metadata
import json
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import data_pipeline
from data_pipeline.config.extract import TrafilaturaConfig
from data_pipeline.document import Extractor
from data_pipeline.read.trafilatura_child import TEXT
from data_pipeline.step import Dropped
from llmtrain.errors import DataError

_ENVIRONMENT = ("PYTHONHASHSEED=0", "TZ=UTC", "LC_ALL=C.UTF-8", "PYTHONWARNINGS=ignore")
"""What the child is told on top of its parent's, so that every machine gives the same text."""
_START_SECONDS = 300.0
_WALL_FACTOR = 60
"""A child that waits for something else than the processor is given up after this many limits."""
_ATTEMPTS = 2


def _options(config: TrafilaturaConfig) -> dict[str, Any]:
    """Return the arguments of ``trafilatura.extract``."""
    return {
        "deduplicate": False,
        "favor_precision": config.favor == "precision",
        "favor_recall": config.favor == "recall",
        "include_comments": False,
        "include_formatting": False,
        "include_images": False,
        "include_links": False,
        "include_tables": config.tables,
        "output_format": "txt",
        "with_metadata": False,
    }


class TrafilaturaProcess:
    """A child process that runs trafilatura; it is started again when it has died."""

    def __init__(self, config: TrafilaturaConfig) -> None:
        """Nothing is started before the first page."""
        self._options = _options(config)
        self._limit_s = config.limit_s
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("lxml", "justext")]
        self.extractor = Extractor(
            name="trafilatura",
            version=importlib.metadata.version("trafilatura"),
            options=json.dumps(
                {**self._options, "with": ", ".join(versions)},
                sort_keys=True, separators=(",", ":"),
            ),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return self._child.pid if self._child is not None else None

    def text_of(self, html: str, tree: Any = None) -> str | Dropped:
        """Return the text of a page, or ``extract.timed_out``, ``.crashed`` or ``.failed``."""
        content = html.encode("utf-8", "replace")
        for _ in range(_ATTEMPTS):
            answer = self._ask(content)
            if answer is not None:
                text = answer[1:].decode()
                return text if answer[:1] == TEXT else Dropped("extract.failed")
            if self._stop() == -signal.SIGPROF:
                return Dropped("extract.timed_out")
        return Dropped("extract.crashed")

    def _ask(self, content: bytes) -> bytes | None:
        """Return what the child answers, or None if it has died or waits for ever."""
        pipe = self._pipe or self._start()
        try:
            pipe.send_bytes(content)
            if pipe.poll(_WALL_FACTOR * self._limit_s + _START_SECONDS):
                return pipe.recv_bytes()
        except (EOFError, OSError):
            pass
        return None

    def _start(self) -> Connection:
        self._pipe, other = Pipe()
        arguments = [str(other.fileno()), json.dumps(self._options), str(self._limit_s)]
        self._child = subprocess.Popen(
            ["env", *_ENVIRONMENT, sys.executable, "-m", "data_pipeline.read.trafilatura_child",
             *arguments],
            cwd=Path(data_pipeline.__file__).parent.parent,
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        other.close()
        try:
            if self._pipe.poll(_START_SECONDS) and self._pipe.recv_bytes() == TEXT:
                return self._pipe
        except (EOFError, OSError):
            pass
        self._child.kill()
        _, said = self._child.communicate()
        self._stop()
        last = said.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise DataError(
            f"trafilatura does not start: {last[-1]}; run: pip install 'llmtrain[data]'"
        )

    def _stop(self) -> int | None:
        """End the child; return the status it had ended with before, if it was dead."""
        child, self._child = self._child, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if child is None:
            return None
        try:
            status = child.wait(1.0)  # a closed pipe ends an idle child
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        if child.stderr is not None:
            child.stderr.close()
        return status
