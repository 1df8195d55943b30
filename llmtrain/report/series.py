"""Rows of metrics as series of a plot: over steps, tokens and time, thinned so that spikes stay.

A thinned series keeps the least and the greatest value of every stretch, so a spike of one step in
100,000 is drawn. A point is ``[step, value, tokens, time]``.

    timeline = Timeline(rows, unit_s=60.0)
    line("loss", 0, timeline.points(rows.column("loss")))
"""

import math

import numpy as np
from numpy.typing import NDArray

from llmtrain.report.columns import Columns, Row, Values

Point = list[float]

MAX_POINTS = 1500


class Timeline:
    """Where each row of a run stands: step, tokens and time spent in training steps."""

    def __init__(self, rows: Columns, unit_s: float = 1.0) -> None:
        """Take ``rows`` in order; time is told in units of ``unit_s`` seconds."""
        self._steps = rows.column("step").astype(np.int64)
        self._tokens = rows.column("tokens").astype(np.int64)
        self._time = step_seconds(rows).cumsum() / unit_s

    def points(self, values: Values, limit: int = MAX_POINTS) -> list[Point]:
        """Points of the rows that have a value, at most about ``limit`` of them."""
        kept = thinned(np.flatnonzero(~np.isnan(values)), values, limit)
        numbers = (self._steps, values, self._tokens, self._time)
        drawn = zip(*(one[kept].tolist() for one in numbers), strict=True)
        return [
            [step, rounded(value), tokens, rounded(time)] for step, value, tokens, time in drawn
        ]


def step_seconds(rows: Columns) -> Values:
    """Seconds of training steps since the row before, by row."""
    steps: Values = np.diff(rows.column("step"), prepend=0.0).clip(min=0.0)
    return np.nan_to_num(rows.column("step_time_s")) * steps


def time_unit(seconds: float) -> tuple[str, float]:
    """Name of the axis of time for runs as long as this, and its unit in seconds."""
    for name, unit_s in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 3 * unit_s:
            return name, unit_s
    return "seconds", 1.0


def thinned(known: NDArray[np.intp], values: Values, limit: int) -> NDArray[np.intp]:
    """Indices out of ``known`` that keep first, last, and each stretch's extremes of ``values``."""
    if len(known) <= limit:
        return known
    size = math.ceil(2 * len(known) / limit)
    places = np.pad(known, (0, -len(known) % size), mode="edge").reshape(-1, size)
    stretches, row = values[places], np.arange(len(places))
    extremes = [places[row, stretches.argmin(1)], places[row, stretches.argmax(1)]]
    return np.unique(np.concatenate([known[[0, -1]], *extremes]))


def smooth(values: Values) -> Values:
    """Mean of the last 5 % of the known values at each of them."""
    known = np.flatnonzero(~np.isnan(values))
    width = max(1, len(known) // 20)
    steps = np.zeros((len(known), 2))  # what comes into the mean at each of them, what leaves it
    steps[:, 0] = values[known]
    steps[width:, 1] = -values[known[:-width]]
    result = np.full(len(values), np.nan)
    result[known] = steps.cumsum()[1::2] / np.minimum(width, np.arange(len(known)) + 1)
    return result


def line(name: str, color: int, points: list[Point], **more: object) -> Row:
    """One line of a plot; ``more`` are faint, dash, dots, line and others that lines.js names."""
    return {"name": name, "color": color, "points": points, **more}


def any_known(values: Values) -> bool:
    """Whether any row has a value."""
    return not bool(np.isnan(values).all())


def last(values: Values) -> float | None:
    """The last known value; None where there are none."""
    known = values[~np.isnan(values)]
    return float(known[-1]) if len(known) else None


def median(values: Values) -> float | None:
    """The upper median of the known values; None where there are none."""
    known = np.sort(values[~np.isnan(values)])
    return float(known[len(known) // 2]) if len(known) else None


def rounded(value: float) -> float:
    """Enough digits to draw with."""
    return float(f"{value:.6g}")
