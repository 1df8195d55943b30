"""What a trial is judged by: one number read from its metrics.jsonl.

Invariant: the number depends on the rows alone, so that a trial that was killed and went on gives
the same one; a number that is not finite is None.

    Objective(metric=None, direction="minimize").value(Path("runs/lr/trial-000"))
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain import json_lines

LAST_SHARE = 0.05
"""Part of the rows whose mean loss stands for the end of training."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A field of metrics.jsonl and whether less of it is better."""

    metric: str | None = None
    """Field, ``source_loss.web`` for one source, a field of several sources for their mean.

    None takes the last held-out loss where the run evaluates, else the mean loss of the last 5 % of
    the rows.
    """
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which end is better."""

    def value(self, run: Path) -> float | None:
        """The number of a run that is done; None where it has none or it is not finite."""
        rows = json_lines.read(run / "metrics.jsonl")
        if self.metric is not None:
            return last(number(row, self.metric) for row in rows)
        held_out = last(number(row, "validation_loss") for row in rows)
        if held_out is not None:
            return held_out
        tail = rows[-max(1, round(LAST_SHARE * len(rows))) :]
        return _mean([number(row, "loss") for row in tail])

    def intermediate(self, row: Mapping[str, Any]) -> float | None:
        """The number of one row on the way; None where the row does not tell it."""
        return number(row, self.metric or "loss")

    def key(self, value: float | None) -> tuple[bool, float]:
        """Sorts better values first and trials without one last."""
        if value is None:
            return True, 0.0
        return False, value if self.direction == "minimize" else -value


def number(row: Mapping[str, Any], path: str) -> float | None:
    """A field of a row, of several sources their mean; None where it is no finite number."""
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping):
        return _mean(list(found.values()))
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def last(numbers: Iterator[float | None]) -> float | None:
    """The last number that is there."""
    found = None
    for each in numbers:
        found = found if each is None else each
    return found


def _mean(numbers: Sequence[float | None]) -> float | None:
    """Mean of numbers; None where one of them is missing, or all."""
    there = [n for n in numbers if isinstance(n, int | float) and math.isfinite(n)]
    return sum(there) / len(there) if there and len(there) == len(numbers) else None
