"""Where rows of metrics go first: metrics.jsonl and the console.

Every sink takes the rows of one rank alone. A resumed run goes on where its checkpoint was: rows
after it are cut. A disk without room costs no row: what does not fit waits in memory.

    with JsonLines(run.metrics_jsonl, after_step=20) as lines:
        lines.write({"step": 21, "loss": 3.2})
"""

import logging
import os
import sys
from collections import deque
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from llmtrain import json_lines
from llmtrain.train.metrics import Row

logger = logging.getLogger(__name__)

SLOW = 1.2
"""Ratio of the slowest rank's step time to the median from which on it is named."""


class JsonLines(AbstractContextManager["JsonLines"]):
    """``metrics.jsonl``: one JSON object per row, in order of steps, each whole or absent."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Go on after ``after_step``: later rows, of a past that is undone, are cut."""
        self._path = path
        self._after_step = after_step
        self._file: IO[bytes] | None = None
        self._waiting: deque[Row] = deque()

    def __enter__(self) -> "JsonLines":
        """Cut the file in place, which needs no room, and open it for appending."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a+b", buffering=0)
        self._file.truncate(_end_of(self._path, self._after_step))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write what waits, if there is room by now, and close the file."""
        if self._file is None:
            return
        try:
            with self._file:
                self._put()
        except OSError as no_room:
            logger.error("%s lacks %d rows (%s)", self._path, len(self._waiting), no_room.strerror)

    def write(self, row: Row) -> None:
        """Append one row; it is in the file when this returns.

        Raises:
            OSError: there is no room; the row is written with the next one that fits.
        """
        self._waiting.append(row)
        self._put()

    def _put(self) -> None:
        """Append the rows that wait, in order, and leave no part of one that does not fit."""
        if self._file is None:
            raise RuntimeError("JsonLines is used outside its with block")
        while self._waiting:
            size = os.fstat(self._file.fileno()).st_size
            try:
                json_lines.put(self._file.fileno(), self._waiting[0])
            except OSError:
                self._file.truncate(size)
                raise
            self._waiting.popleft()


def _end_of(path: Path, step: int) -> int:
    """Bytes of the file up to and with the last row that is not after ``step``."""
    end = at = 0
    with path.open("rb") as file:
        for line in file:
            at += len(line)
            if any(row["step"] <= step for row in json_lines.whole([line])):
                end = at
    return end


class Console(AbstractContextManager["Console"]):
    """A line per row; on a terminal one line that is rewritten in place."""

    def __init__(self, num_steps: int, after_step: int, progress_bar: bool) -> None:
        """Count from ``after_step`` to ``num_steps``; the live line is shown on a terminal only."""
        self._num_steps = num_steps
        self._after_step = after_step
        self._is_live = progress_bar and sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> "Console":
        """Show the live line."""
        if self._is_live:
            self._bar = tqdm(
                total=self._num_steps, initial=self._after_step, dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:10}| {desc}",
            )  # fmt: skip
            self._bar.set_description_str(f"step {self._after_step}/{self._num_steps}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the live line as it stands."""
        if self._bar is not None:
            self._bar.close()

    def write(self, row: Row) -> None:
        """Print the line, or put it in the place of the one before; the log file has every one."""
        line = console_line(row)
        logger.info("%s", line, extra={"file_only": self._bar is not None})
        if self._bar is not None:
            with suppress(OSError):  # the terminal is gone
                self._bar.update(row["step"] - self._bar.n)
                self._bar.set_description_str(line)


def console_line(row: Row) -> str:
    """A row in one line of text."""
    left_s = (row["num_steps"] - row["step"]) * row["step_time_s"]
    parts = [
        f"step {row['step']}/{row['num_steps']}",
        f"loss {_number(row['loss'], '.4f')}",
        _rewards(row.get("rewards")),
        f"lr {row['lr']:.2e}",
        f"grad norm {_number(row['grad_norm'], '.3f')}",
        f"{row['tokens_per_s']:,.0f} tokens/s",
        f"MFU {row['mfu']:.1%}" if row["mfu"] is not None else "",
        f"skipped {row['skipped_steps']}" if row["skipped_steps"] else "",
        _slowest(row.get("rank_step_time_s")),
        *(f"held-out {n} {v:.4f}" for n, v in row.get("validation_loss", {}).items()),
        *(f"accuracy {n} {v:.1%}" for n, v in row.get("validation_accuracy", {}).items()),
        f"{_clock(left_s)} left",
    ]
    return " | ".join(part for part in parts if part)


def _rewards(rewards: Row | None) -> str:
    """What a preference run says of its pairs."""
    if rewards is None:
        return ""
    return f"margin {rewards['margin']:.4f} | accuracy {rewards['accuracy']:.1%}"


def _slowest(times: Row | None) -> str:
    """Name the slowest rank where it is far behind the others."""
    if times is None or times["max"] <= SLOW * times["median"]:
        return ""
    return f"rank {times['slowest_rank']} is {times['max'] / times['median']:.1f} x slower"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
