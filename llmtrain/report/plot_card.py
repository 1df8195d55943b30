"""A card that holds a plot: what the page's script draws, and the same numbers as a table.

page = Plots()
page.lines("lr", "Learning rate", "Cosine.", [line("learning rate", 0, points)])
document(title, body, page.specs)
"""

import math
from bisect import bisect_right

import numpy as np

from llmtrain.report.columns import Columns, Row
from llmtrain.report.markup import card, folded, number, table
from llmtrain.report.series import any_known, rounded

_TABLE_ROWS = 12
_HEAT_COLUMNS = 240


class Plots:
    """The plots of one page, gathered while its cards are made."""

    def __init__(self, **shared: object) -> None:
        """Give ``shared`` (axes, marks, bands) to every plot over steps."""
        self.specs: dict[str, Row] = {}
        self._shared = shared

    def lines(
        self,
        name: str,
        title: str,
        note: str,
        series: list[Row],
        wide: bool = False,
        **spec: object,
    ) -> str:
        """The card of lines over steps, tokens or time; ``spec`` as lines.js takes it."""
        linked = {"link": "run", **self._shared}
        self.specs[name] = {"series": series, **linked, "tall": wide, "label": title, **spec}
        return card(title, note, f"{_place(name)}{folded(_numbers(series))}", wide=wide)

    def free(
        self, name: str, title: str, note: str, series: list[Row], listing: str,
        wide: bool = False, above: str = "", **spec: object,
    ) -> str:  # fmt: skip
        """The card of lines or dots over something else than the steps of one run.

        ``above`` and ``listing`` are HTML over the plot and folded below it.
        """
        self.specs[name] = {"series": series, "tall": wide, "label": title, **spec}
        return card(title, note, f"{above}{_place(name)}{folded(listing)}", wide=wide)

    def heat(self, name: str, title: str, note: str, rows: Columns, key: str, unit: str) -> str:
        """The card of a heat map of ``row[key]``, a number by layer; empty where none is known.

        A column is a stretch of rows and shows their greatest value: spikes stay.
        """
        layers = rows.names(key)
        if not any(any_known(rows.inside(key, layer)) for layer in layers):
            return ""
        known = np.flatnonzero(~np.isnan(rows.column(key)))
        starts = np.arange(0, len(known), max(1, -(-len(known) // _HEAT_COLUMNS)))
        values = [
            [None if math.isnan(value) else rounded(value) for value in greatest.tolist()]
            for greatest in (
                np.fmax.reduceat(rows.inside(key, layer)[known], starts) for layer in layers
            )
        ]
        ends = known[np.append(starts[1:], len(known)) - 1]
        steps = [int(step) for step in rows.column("step")[ends]]
        self.specs[name] = {
            "kind": "heat", "rows": layers, "columns": steps, "values": values, "unit": unit,
            "label": title, "logName": "log color", "log": "y" if _wide(values) else "",
        }  # fmt: skip
        chosen = _spread(list(range(len(steps))))
        body = [[layer, *(number(values[r][c]) for c in chosen)] for r, layer in enumerate(layers)]
        listing = table(["layer", *(f"step {steps[c]:,}" for c in chosen)], body)
        return card(title, note, f"{_place(name)}{folded(listing)}")

    def parallel(self, name: str, title: str, note: str, spec: Row) -> str:
        """The card of parallel coordinates; ``spec`` as parallel.js takes it."""
        self.specs[name] = {"kind": "parallel", "label": title, **spec}
        return card(title, note, f'<div class="plot wide" id="{name}"></div>', wide=True)


def _place(name: str) -> str:
    return f'<div class="plot" id="{name}"></div>'


def _numbers(series: list[Row]) -> str:
    """The series at some steps, the last one among them."""
    longest = max(series, key=lambda one: len(one["points"]))
    steps = _spread([int(point[0]) for point in longest["points"]])
    known = [[int(point[0]) for point in one["points"]] for one in series]
    rows = []
    for step in steps:
        cells = [f"{step:,}"]
        for one, own in zip(series, known, strict=True):
            at = bisect_right(own, step) - 1
            cells.append(number(one["points"][at][1] if at >= 0 else None))
        rows.append(cells)
    return table(["step", *(one["name"] for one in series)], rows)


def _spread(values: list[int]) -> list[int]:
    """Some of the values, the last one among them."""
    stride = max(1, -(-len(values) // _TABLE_ROWS))
    return values[::-1][::stride][::-1]


def _wide(values: list[list[float | None]]) -> bool:
    """Whether the values span so much that a linear scale would hide most of them."""
    known = [value for row in values for value in row if value is not None]
    return min(known) > 0 and max(known) > 20 * min(known)
