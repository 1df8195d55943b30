"""The report's curves: what the page's script draws, and the same numbers as tables.

Each function adds its plot to ``plots`` (id -> what to draw) and returns the card that holds it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llmtrain.report.markup import card, folded, number, table
from llmtrain.report.record import Row, RunRecord

_MAX_POINTS = 1500
_TABLE_ROWS = 12


def loss(record: RunRecord, plots: dict[str, Row]) -> str:
    """Training loss, its running mean and the held-out loss."""
    raw = _points(record.rows, lambda row: row["loss"])
    series = [_series("training", 0, raw, faint=True), _series("running mean", 0, _smooth(raw))]
    for name in _names(record.rows, "validation_loss"):
        points = _points(record.rows, _inside("validation_loss", name))
        color, dots = record.color(name), len(points) <= 60
        series.append(_series(f"held out: {name}", color, points, dots=dots))
    label = "Loss over steps"
    plots["loss"] = {"series": series, "tall": True, "marks": record.resumed, "label": label}
    note = "Nats per target token; each point is the mean since the one before."
    return _plot_card("loss", "Loss", note, series, wide=True)


def source_loss(record: RunRecord, plots: dict[str, Row]) -> str:
    """Training loss per source."""
    names = _names(record.rows, "source_loss")
    series = [
        _series(
            name, record.color(name), _smooth(_points(record.rows, _inside("source_loss", name)))
        )
        for name in names
    ]
    if not any(one["points"] for one in series):
        return ""
    plots["source-loss"] = {"series": series, "marks": record.resumed, "label": "Loss per source"}
    return _plot_card("source-loss", "Loss per source", "Running mean of each source.", series)


def throughput(record: RunRecord, plots: dict[str, Row]) -> str:
    """Tokens per second."""
    points = _points(record.rows, lambda row: row["tokens_per_s"])
    series = [_series("tokens per second", 0, points)]
    plots["throughput"] = {
        "series": series, "zero": True, "marks": record.resumed, "unit": "/s",
        "label": "Tokens per second over steps",
    }  # fmt: skip
    waited = sum(float(row.get("data_wait_s") or 0) for row in record.rows)
    stepped = sum(float(row["step_time_s"]) for row in record.rows)
    note = f"Tokens per second; {waited / max(stepped, 1e-9):.1%} of the time waited for data."
    mfu = [row["mfu"] for row in record.rows if row.get("mfu") is not None]
    if mfu:
        middle = sorted(mfu)[len(mfu) // 2]
        note += f" MFU {middle:.1%} (median; {record.rows[-1]['mfu_convention']})."
    return _plot_card("throughput", "Throughput", note, series)


def learning_rate(record: RunRecord, plots: dict[str, Row]) -> str:
    """Learning rate."""
    series = [_series("learning rate", 0, _points(record.rows, lambda row: row["lr"]))]
    plots["lr"] = {"series": series, "zero": True, "label": "Learning rate over steps"}
    kind = record.config.schedule.kind
    note = f"{kind} over tokens, peak {number(record.config.optimizer.lr)}."
    return _plot_card("lr", "Learning rate", note[0].upper() + note[1:], series)


def gradient_norm(record: RunRecord, plots: dict[str, Row]) -> str:
    """Gradient norm before the clip."""
    points = _points(record.rows, lambda row: row["grad_norm"])
    series = [_series("gradient norm", 0, points)]
    plots["norm"] = {"series": series, "marks": record.resumed, "label": "Gradient norm over steps"}
    skipped = sum(int(row.get("skipped_steps") or 0) for row in record.rows)
    clip = record.config.optimizer.grad_clip_norm
    note = f"Global, before clipping to {number(clip)}; {skipped:,} steps skipped."
    return _plot_card("norm", "Gradient norm", note, series)


def _plot_card(name: str, title: str, note: str, series: list[Row], wide: bool = False) -> str:
    """A card with a plot that the page's script draws, and its numbers as a table."""
    steps = [point[0] for point in series[0]["points"]]
    stride = max(1, -(-len(steps) // _TABLE_ROWS))
    chosen = steps[::-1][::stride][::-1]
    values = [dict(map(tuple, one["points"])) for one in series]
    rows = [[f"{step:,}", *(number(_nearest(value, step)) for value in values)] for step in chosen]
    numbers = table(["step", *(one["name"] for one in series)], rows)
    body = f'<div class="plot" id="{name}"></div>{folded(numbers)}'
    return card(title, note, body, wide=wide)


def _series(
    name: str, color: int, points: list[list[Any]], faint: bool = False, dots: bool = False
) -> Row:
    """One line of a plot."""
    return {"name": name, "color": color, "points": points, "faint": faint, "dots": dots}


def _names(rows: Sequence[Row], key: str) -> list[str]:
    """Sources that appear under ``key`` in any row, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.get(key) or {}))


def _inside(key: str, name: str) -> Callable[[Row], float | None]:
    """Return a reader of ``row[key][name]``."""
    return lambda row: (row.get(key) or {}).get(name)


def _points(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[list[Any]]:
    """Pairs [step, value] where there is a value, thinned to means where there are too many."""
    found = [[int(row["step"]), v] for row in rows if (v := value(row)) is not None]
    size = -(-len(found) // _MAX_POINTS)
    if size <= 1:
        return [[step, _rounded(v)] for step, v in found]
    groups = (found[i : i + size] for i in range(0, len(found), size))
    return [[g[-1][0], _rounded(sum(v for _, v in g) / len(g))] for g in groups]


def _smooth(points: list[list[Any]]) -> list[list[Any]]:
    """Mean of the last 5 % of the points at each point."""
    width = max(1, len(points) // 20)
    result = []
    for i, (step, _) in enumerate(points):
        window = [value for _, value in points[max(0, i - width + 1) : i + 1]]
        result.append([step, _rounded(sum(window) / len(window))])
    return result


def _nearest(values: dict[int, float], step: int) -> float | None:
    """Value at ``step``, or the last one before it."""
    known = [known for known in values if known <= step]
    return values[max(known)] if known else None


def _rounded(value: float) -> float:
    """Enough digits to draw with."""
    return float(f"{value:.6g}")
