"""Rows of metrics as series of a plot: over steps, tokens and time, thinned so that spikes stay.

A thinned series keeps the least and the greatest value of every stretch, so a spike of one step in
100,000 is drawn. A point is ``[step, value, tokens, time]``.

    timeline = Timeline(rows, unit_s=60.0)
    line("loss", 0, timeline.points([row["loss"] for row in rows]))
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

Row = dict[str, Any]
Point = list[float]
Values = Sequence[float | None]

MAX_POINTS = 1500


class Timeline:
    """Where each row of a run stands: step, tokens and time spent in training steps."""

    def __init__(self, rows: Sequence[Row], unit_s: float = 1.0) -> None:
        """Take ``rows`` in order; time is told in units of ``unit_s`` seconds."""
        self.steps = [int(row["step"]) for row in rows]
        self._tokens = [int(row["tokens"]) for row in rows]
        spent = accumulate(step_seconds(rows))
        self._time = [rounded(seconds / unit_s) for seconds in spent]

    def points(self, values: Values, limit: int = MAX_POINTS) -> list[Point]:
        """Points of the rows that have a value, at most about ``limit`` of them."""
        known = [i for i, value in enumerate(values) if value is not None]
        kept = thinned(known, values, limit)
        return [
            [self.steps[i], rounded(float(values[i] or 0.0)), self._tokens[i], self._time[i]]
            for i in kept
        ]


def step_seconds(rows: Sequence[Row]) -> list[float]:
    """Seconds of training steps since the row before, by row."""
    steps = [0, *(int(row["step"]) for row in rows)]
    return [
        float(row.get("step_time_s") or 0.0) * max(0, int(row["step"]) - before)
        for row, before in zip(rows, steps, strict=False)
    ]


def time_unit(seconds: float) -> tuple[str, float]:
    """Name of the axis of time for runs as long as this, and its unit in seconds."""
    for name, unit_s in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 3 * unit_s:
            return name, unit_s
    return "seconds", 1.0


def thinned(known: Sequence[int], values: Values, limit: int) -> list[int]:
    """Indices out of ``known`` that keep first, last, and each stretch's extremes of ``values``."""
    if len(known) <= limit:
        return list(known)
    size = math.ceil(2 * len(known) / limit)
    kept = {known[0], known[-1]}
    found = [value or 0.0 for value in values].__getitem__
    for start in range(0, len(known), size):
        stretch = known[start : start + size]
        kept.add(min(stretch, key=found))
        kept.add(max(stretch, key=found))
    return sorted(kept)


def smooth(values: Values) -> list[float | None]:
    """Mean of the last 5 % of the known values at each of them."""
    known = [i for i, value in enumerate(values) if value is not None]
    width = max(1, len(known) // 20)
    result: list[float | None] = [None] * len(values)
    total = 0.0
    for place, i in enumerate(known):
        total += float(values[i] or 0.0)
        if place >= width:
            total -= float(values[known[place - width]] or 0.0)
        result[i] = total / min(width, place + 1)
    return result


def line(name: str, color: int, points: list[Point], **more: object) -> Row:
    """One line of a plot; ``more`` are faint, dash, dots, line and others that lines.js names."""
    return {"name": name, "color": color, "points": points, **more}


def inside(rows: Sequence[Row], key: str, name: str) -> list[float | None]:
    """``row[key][name]`` of every row, None where there is none."""
    return [(row.get(key) or {}).get(name) for row in rows]


def column(rows: Sequence[Row], key: str) -> list[float | None]:
    """``row[key]`` of every row, None where there is none."""
    return [row.get(key) for row in rows]


def names(rows: Sequence[Row], key: str) -> list[str]:
    """Names that appear under ``key`` in any row, in order of appearance."""
    found: Row = {}
    for row in rows:
        found.update(row.get(key) or ())
    return list(found)


def median(values: Values) -> float | None:
    """The upper median of the known values; None where there are none."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def rounded(value: float) -> float:
    """Enough digits to draw with."""
    return float(f"{value:.6g}")
