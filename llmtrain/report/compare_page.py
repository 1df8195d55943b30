"""The page of several runs: curves over each other, settings that differ, numbers at the end.

A run has one color all over the page, and one switch that draws or hides it in every plot.

    text = render(read_several([Path("runs/a"), Path("runs/b")]))
"""

import html
from collections.abc import Sequence

from llmtrain.report.columns import Row, Values
from llmtrain.report.compare_record import RunSummary, differing
from llmtrain.report.markup import (
    card,
    controls,
    document,
    folded,
    header,
    number,
    short,
    table,
    tiles,
)
from llmtrain.report.plot_card import Plots
from llmtrain.report.series import Timeline, line, smooth, time_unit

_NUMBERS = (
    ("loss", "training loss", min),
    ("held_out", "held-out loss", min),
    ("bits_per_byte", "bits per byte", min),
    ("tokens", "tokens", None),
    ("tokens_per_s", "tokens/s", max),
    ("mfu", "MFU", max),
    ("minutes", "minutes of training", None),
)
"""Key, heading and what is best of every final number."""


def render(runs: Sequence[RunSummary]) -> str:
    """Return the page."""
    unit, unit_s = time_unit(max(run.seconds() for run in runs))
    plots = Plots(axes=["step", "tokens", f"{unit} of training"], quiet=True)
    timelines = [Timeline(run.rows, unit_s) for run in runs]
    limit = max(150, min(1500, 30_000 // len(runs)))
    sections = [
        _curves("loss", "Training loss", "Running mean, nats per target token.",
                runs, timelines, [smooth(run.rows.column("loss")) for run in runs], plots, limit),
        _numbers(runs),
        _curves("held-out", "Held-out loss", "Nats per token, the mean over all held-out tokens.",
                runs, timelines, [run.held_out() for run in runs], plots, limit),
        _curves("throughput", "Throughput", "Tokens per second.", runs, timelines,
                [run.rows.column("tokens_per_s") for run in runs], plots, limit, zero=True),
        _curves("norm", "Gradient norm", "Global, before clipping.", runs, timelines,
                [run.rows.column("grad_norm") for run in runs], plots, limit),
        _curves("lr", "Learning rate", "As scheduled.", runs, timelines,
                [run.rows.column("lr") for run in runs], plots, limit, zero=True),
        _settings(runs),
    ]  # fmt: skip
    legend = [(run.name, color) for color, run in enumerate(runs)]
    top = [_header(runs), _tiles(runs), controls(["steps", "tokens", "time"], legend)]
    body = "\n".join([*top, '<div class="cards">', *sections, "</div>"])
    return document(f"{len(runs)} runs · llmtrain", body, plots.specs)


def _header(runs: Sequence[RunSummary]) -> str:
    going = sum(run.state() == "training" for run in runs)
    badge = f"{going} still training" if going else ""
    return header(f"{len(runs)} runs side by side", badge, "stopped", [r.name for r in runs])


def _tiles(runs: Sequence[RunSummary]) -> str:
    """The best run by what there is to judge by."""
    cells: list[tuple[str, str, str]] = []
    for key, label, best in _NUMBERS:
        known = [(value, r.name) for r in runs if (value := r.numbers()[key]) is not None]
        if best is None or not known or len(cells) == 4:
            continue
        value, name = best(known)
        shown = short(value) if key == "tokens_per_s" else f"{value:.1%}" if key == "mfu" else (
            number(value))  # fmt: skip
        cells.append((f"Best {label}", shown, html.escape(name)))
    return tiles(cells)


def _curves(
    name: str, title: str, note: str, runs: Sequence[RunSummary], timelines: Sequence[Timeline],
    values: Sequence[Values], plots: Plots, limit: int, zero: bool = False,
) -> str:  # fmt: skip
    """A card with a line for every run; empty where no run has values."""
    series: list[Row] = []
    for color, (run, timeline, own) in enumerate(zip(runs, timelines, values, strict=True)):
        points = timeline.points(own, limit)
        series.append(line(run.name, color, points, dots=name == "held-out" and len(points) <= 60))
    if not any(one["points"] for one in series):
        return ""
    return plots.lines(name, title, note, series, wide=name == "loss", zero=zero)


def _numbers(runs: Sequence[RunSummary]) -> str:
    """What every run ended with, the best of each column marked."""
    numbers = [run.numbers() for run in runs]
    columns = [one for one in _NUMBERS if any(n[one[0]] is not None for n in numbers)]
    best = {
        key: choose(value for n in numbers if (value := n[key]) is not None)
        for key, _, choose in columns
        if choose is not None
    }
    rows = []
    for color, (run, own) in enumerate(zip(runs, numbers, strict=True)):
        swatch = f'<i class="swatch" style="--color:var(--c{color % 8})"></i>'
        cells = [f'<span class="key">{swatch}{html.escape(run.name)}</span>', run.state()]
        for key, _, _ in columns:
            text = _shown(key, own[key])
            marked = key in best and own[key] == best[key]
            cells.append(f'<span class="best">{text}</span>' if marked else text)
        rows.append(cells)
    listing = table(["run", "state", *(label for _, label, _ in columns)], rows, sort=True)
    note = "At each run's last row; the best of a column is marked. Click a heading to sort."
    return card("Final numbers", note, listing, wide=True)


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key == "mfu":
        return f"{value:.1%}"
    return f"{value:,.0f}" if key in ("tokens", "tokens_per_s") else f"{value:.4g}"


def _settings(runs: Sequence[RunSummary]) -> str:
    """Settings that are not alike in all runs."""
    found = differing(runs)
    if not found:
        return card("Differing settings", "All settings are alike.", "", wide=True)
    rows = [[html.escape(key), *map(html.escape, values)] for key, values in found.items()]
    same = sum(len(run.settings) for run in runs) // len(runs) - len(found)
    note = f"{len(found)} of them; about {max(0, same)} others are alike in all runs."
    listing = table(["setting", *(run.name for run in runs)], rows)
    body = listing if len(rows) <= 20 else folded(listing, f"{len(rows)} settings")
    return card("Differing settings", note, body, wide=True)
