"""Finds spikes of loss and gradient norm in the rows of a run, and says so; it never acts.

A value spikes where it lies more than ``zscore`` deviations above the median of the last rows. The
deviation is 1.4826 times the median distance from the median, which one spike does not move, and at
least 1 % of the median, so that a flat curve does not make noise a spike.

    sinks.append(Spikes(events, zscore=6.0, rows=read_rows(run.metrics_jsonl)))
"""

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from llmtrain.train.events import Events

WATCHED = {"loss": "loss", "grad_norm": "gradient norm"}
"""Fields of a row that may spike, and their names in a sentence."""
KEPT_ROWS = 50
FEWEST_ROWS = 10
_DEVIATIONS = 1.4826
_SMALLEST = 0.01


class Spikes:
    """A sink that turns rows into events ``spike`` and ``skipped_step``."""

    def __init__(
        self, events: Events, zscore: float | None, rows: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Go on from ``rows``, those of the run so far; null ``zscore`` finds no spikes."""
        self._events = events
        self._zscore = zscore
        self._kept = {name: deque[float](maxlen=KEPT_ROWS) for name in WATCHED}
        self._spiking = dict.fromkeys(WATCHED, False)
        for row in rows:
            self._keep(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Look at one row; of a spike over several rows the first is an event."""
        if row["skipped_steps"]:
            self._events.write(
                "skipped_step",
                f"{row['skipped_steps']} updates up to here were skipped: loss or gradient norm "
                "was not finite",
            )
        for name in WATCHED if self._zscore is not None else ():
            text = self._spike(name, row[name], self._zscore or 0.0)
            if text is not None and not self._spiking[name]:
                self._events.write("spike", text)
            self._spiking[name] = text is not None
        self._keep(row)

    def _spike(self, name: str, value: float | None, zscore: float) -> str | None:
        kept = self._kept[name]
        if value is None or len(kept) < FEWEST_ROWS:
            return None
        middle, deviation = robust(kept)
        deviations = (value - middle) / deviation
        if deviations <= zscore:
            return None
        return (
            f"{WATCHED[name]} {value:.4g} is {deviations:.1f} deviations above the median of the "
            f"last {len(kept)} rows, {middle:.4g}"
        )

    def _keep(self, row: Mapping[str, Any]) -> None:
        for name, kept in self._kept.items():
            if row[name] is not None:
                kept.append(row[name])


def robust(values: Iterable[float]) -> tuple[float, float]:
    """Median and robust standard deviation (the median's distance, scaled) of ``values``."""
    kept = list(values)
    middle = median(kept)
    spread = median(abs(value - middle) for value in kept)
    return middle, max(_DEVIATIONS * spread, _SMALLEST * abs(middle), 1e-12)
