"""Where log lines go, and how a command ends: one message and an exit status, or a traceback.

Rank 0 writes to the console, every rank to ``RUN/logs/rankN.log``. Wrong input is a message without
a traceback and status 2; a fault is a traceback and status 1.

    setup(Path("runs/demo"), rank=0)
    raise SystemExit(run_command(lambda: train(config)))
"""

import logging
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llmtrain.errors import ConfigError, LLMTrainError

logger = logging.getLogger(__name__)

PACKAGES = ("llmtrain", "data_pipeline")
"""Packages whose lines are shown from INFO on; other libraries from WARNING on."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr, above a progress bar where one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line; lines meant for the files alone are left out.

        Where whoever read the console is gone, nobody misses it: no run ends for that.
        """
        if getattr(record, "file_only", False):
            return
        bars = sys.modules.get("tqdm")
        if bars is None:
            super().emit(record)
        else:
            with suppress(OSError):
                bars.tqdm.write(self.format(record), file=sys.stderr)


class _ConsoleFormat(logging.Formatter):
    """The message alone; from WARNING on with its level."""

    def format(self, record: logging.LogRecord) -> str:
        """One console line."""
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _RankFile(logging.FileHandler):
    """The log file of one rank."""


def setup(run_dir: Path | None, rank: int = 0) -> None:
    """Send lines to the console (rank 0) and, with a run folder, to ``logs/rank<rank>.log``.

    Calling it again replaces what the call before set up.
    """
    close()
    root = logging.getLogger()
    for name in PACKAGES:
        logging.getLogger(name).setLevel(logging.INFO)
    if rank == 0:
        console = _Console(sys.stderr)
        console.setFormatter(_ConsoleFormat("%(message)s"))
        root.addHandler(console)
    if run_dir is not None:
        folder = run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = _RankFile(folder / f"rank{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(file)


def close() -> None:
    """Take down the handlers of ``setup`` and close their files."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, (_Console, _RankFile)):
            root.removeHandler(handler)
            handler.close()


def run_command(main: Callable[[], int], rank: int = 0) -> int:
    """Run ``main`` and turn what escapes into a message on stderr and an exit status."""
    try:
        return main()
    except (Exception, KeyboardInterrupt) as error:
        return report(error, rank)


def report(error: BaseException, rank: int = 0) -> int:
    """Say what went wrong, on stderr and in the rank's log file; returns the exit status."""
    if isinstance(error, LLMTrainError):
        _say(_message(error), rank)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted", rank)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of a pipe went away: nobody to tell
        sys.stdout = None
        return 1
    _say("".join(traceback.format_exception(error)).rstrip(), rank)
    return 1


def _message(error: LLMTrainError) -> str:
    """The error as the user reads it: one line per problem."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    problems = [p.replace("\n", "\n    ") for p in problems]
    if len(problems) == 1:
        return f"error: {problems[0]}"
    return "\n".join([f"error: {len(problems)} problems", *(f"  - {p}" for p in problems)])


def _say(text: str, rank: int) -> None:
    """Write to stderr and to the rank's log file."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n" if rank == 0 else f"rank {rank}: {text}\n")
    if any(isinstance(h, _RankFile) for h in logging.getLogger().handlers):
        logger.error("%s", text, extra={"file_only": True})
