"""Where rows of metrics go first: metrics.jsonl and the console.

Every sink takes the rows of one rank alone. A resumed run goes on where its checkpoint was: rows
after it are cut.

    with JsonLines(run.metrics_jsonl, after_step=20) as lines:
        lines.write({"step": 21, "loss": 3.2})
"""

import json
import logging
import sys
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
    """``metrics.jsonl``: one JSON object per row, in order of steps."""

    def __init__(self, path: Path, after_step: int) -> None:
        """Go on after ``after_step``: later rows, of a past that is undone, are cut."""
        self._path = path
        self._after_step = after_step
        self._file: IO[str] | None = None

    def __enter__(self) -> "JsonLines":
        """Cut the file and open it for appending."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            kept = [row for row in json_lines.read(self._path) if row["step"] <= self._after_step]
            beside = self._path.with_name(f".tmp-{self._path.name}")
            beside.write_text("".join(map(_line, kept)), encoding="utf-8")
            beside.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def write(self, row: Row) -> None:
        """Append one row; it is in the file when this returns."""
        if self._file is None:
            raise RuntimeError("JsonLines is used outside its with block")
        self._file.write(_line(row))
        self._file.flush()


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


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
