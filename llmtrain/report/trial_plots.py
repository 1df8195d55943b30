"""The plots of a sweep: parallel coordinates, objective by parameter and by trial, loss curves.

Trials are colored by their place among all, best to worst, the same in every plot.

    cards = trial_plots.cards(sweep, plots)
"""

import html
import math
from collections.abc import Sequence
from typing import Any

from llmtrain.report.columns import Row
from llmtrain.report.markup import controls, number, table
from llmtrain.report.plot_card import Plots
from llmtrain.report.series import Timeline, line, rounded, smooth
from llmtrain.report.sweep_record import SweepRecord, TrialRecord

_MOST_GROUPS = 8
_MOST_TICKS = 6
_MOST_PARAMETER_PLOTS = 12


def key(sweep: SweepRecord) -> list[str]:
    """Ends and name of the color key."""
    order = sweep.judged
    if not order:
        return ["best", "worst", "no objective yet"]
    return [f"best {number(order[0].value)}", f"{number(order[-1].value)} worst", sweep.metric]


def parallel(sweep: SweepRecord, plots: Plots) -> str:
    """One line for every trial through its parameters to its objective."""
    short, shades = sweep.short_names(), sweep.shades()
    varied = [
        p for p in sweep.parameters if len({str(t.overrides.get(p)) for t in sweep.trials}) > 1
    ]
    axes = [_axis(short[p], p, [t.overrides.get(p) for t in sweep.trials]) for p in varied]
    axes.append(_axis(sweep.metric.split(".")[-1], sweep.metric, [t.value for t in sweep.trials]))
    if not sweep.judged or len(axes) < 2:
        return ""
    spec = {
        "axes": axes,
        "trials": [t.number for t in sweep.trials],
        "shades": [shades.get(t.number) for t in sweep.trials],
        "labels": [f"trial {t.number}, {t.state}" for t in sweep.trials],
        "key": key(sweep),
    }
    note = (
        "Drag along an axis to keep trials here, in the table and in the loss curves; a click on "
        "it keeps all. Dashed: no objective."
    )
    return plots.parallel("parallel", "Parallel coordinates", note, spec)


def parameters(sweep: SweepRecord, plots: Plots) -> list[str]:
    """Objective against every parameter that varies."""
    if not sweep.judged:
        return []
    varied = [
        p for p in sweep.parameters if len({str(t.overrides.get(p)) for t in sweep.judged}) > 1
    ]
    return [_against(sweep, p, varied, plots) for p in varied[:_MOST_PARAMETER_PLOTS]]


def _against(sweep: SweepRecord, parameter: str, varied: Sequence[str], plots: Plots) -> str:
    """Objective against one parameter: dots, joined where the other parameters are alike."""
    axis = _axis(parameter, parameter, [t.overrides.get(parameter) for t in sweep.judged])
    judged = [(t, x) for t, x in zip(sweep.judged, axis["values"], strict=True) if x is not None]
    short, others = sweep.short_names(), [p for p in varied if p != parameter]
    groups: dict[str, list[tuple[TrialRecord, float]]] = {}
    for trial, x in judged:
        name = ", ".join(f"{short[p]}={spelled(trial.overrides.get(p))}" for p in others)
        groups.setdefault(name or "trials", []).append((trial, x))
    joined = len(groups) <= _MOST_GROUPS and all(len(own) > 2 for own in groups.values())
    if joined:
        note = "Every line is one setting of the others; the lowest point is the best of it."
        if sweep.maximize:
            note = note.replace("lowest", "highest")
        series = [_group(name, color, own) for color, (name, own) in enumerate(groups.items())]
    else:
        note = "One dot for each trial, colored from best to worst; the best one is ringed."
        series = [_group("trials", 0, judged) | _colored(sweep, judged)]
    spec: Row = {
        "axes": [parameter], "near": True, "y": sweep.metric,
        "log": "x" if axis["log"] else "", "categories": axis["categories"],
        "ticks": axis.get("ticks"),
    }  # fmt: skip
    if not joined:
        spec["key"] = key(sweep)
    rows = [[str(t.number), html.escape(spelled(t.overrides.get(parameter))), number(t.value)]
            for t, _ in judged[:20]]  # fmt: skip
    listing = table(["trial", short[parameter], sweep.metric], rows)
    name = f"parameter-{sweep.parameters.index(parameter)}"
    title = f"{html.escape(sweep.metric)} by {html.escape(short[parameter])}"
    return plots.free(name, title, note if len(groups) > 1 or not joined else
                      "Every dot is a trial.", series, listing, **spec)  # fmt: skip


def _group(name: str, color: int, own: Sequence[tuple[TrialRecord, float]]) -> Row:
    """A line through the trials of one group, in order of the parameter."""
    own = sorted(own, key=lambda pair: pair[1])
    points = [[x, rounded(t.value or 0.0)] for t, x in own]
    labels = [f"trial {t.number}" for t, _ in own]
    return line(name, color, points, dots=True, labels=labels, trials=[t.number for t, _ in own])


def _colored(sweep: SweepRecord, own: Sequence[tuple[TrialRecord, float]]) -> Row:
    """Dots by their place among all trials."""
    own, shades = sorted(own, key=lambda pair: pair[1]), sweep.shades()
    numbers = [t.number for t, _ in own]
    best = sweep.judged[0].number
    return {
        "line": False,
        "shades": [shades[n] for n in numbers],
        "best": numbers.index(best) if best in numbers else None,
    }


def history(sweep: SweepRecord, plots: Plots, wide: bool) -> str:
    """Objective in the order of the trials, and the best so far."""
    judged = sorted(sweep.judged, key=lambda t: t.number)
    if len(judged) < 3:
        return ""
    better, so_far, best = max if sweep.maximize else min, [], judged[0].value or 0.0
    for trial in judged:
        best = better(best, trial.value or 0.0)
        so_far.append([trial.number, rounded(best)])
    pairs = [(t, float(t.number)) for t in judged]
    series = [
        _group("trials", 0, pairs) | _colored(sweep, pairs),
        line("best so far", 7, so_far, labels=["best so far"] * len(so_far)),
    ]
    rows = [[str(t.number), number(t.value), number(best)]
            for t, (_, best) in zip(judged, so_far, strict=True)]  # fmt: skip
    listing = table(["trial", sweep.metric, "best so far"], rows[-20:])
    note = "In the order of the starts; the line is the best so far."
    return plots.free("history", f"{html.escape(sweep.metric)} by trial", note, series, listing,
                      wide=wide, axes=["trial"], near=True, y=sweep.metric,
                      key=key(sweep))  # fmt: skip


def losses(sweep: SweepRecord, plots: Plots) -> str:
    """Loss curves of all trials."""
    shades = sweep.shades()
    drawn = [t for t in sweep.trials if t.loss() is not None]
    if not drawn:
        return ""
    limit = max(60, min(1000, 40_000 // len(drawn)))
    series = []
    # The best is drawn last, on top.
    for trial in sorted(drawn, key=lambda t: shades.get(t.number, 2.0), reverse=True):
        points = Timeline(trial.rows).points(smooth(trial.rows.column("loss")), limit)
        shade = {"shade": shades[trial.number]} if trial.number in shades else {}
        color = {"faint": True} if not shade else {}
        series.append(line(f"trial {trial.number}, {trial.state}", 7, points,
                           trial=trial.number, **shade, **color))  # fmt: skip
    rows = [[str(t.number), f"{t.rows.last['step']:,}", number(t.loss())] for t in drawn]
    listing = table(["trial", "last step", "training loss"], rows, sort=True)
    note = "Running mean of every trial's training loss, nats per token; grey without objective."
    return plots.free("losses", "Loss of all trials", note, series, listing, wide=True,
                      above=controls(["steps", "tokens", "time"], hint=""),
                      axes=["step", "tokens", "seconds of training"], link="run",
                      key=key(sweep), y="loss", near=False)  # fmt: skip


def study(sweep: SweepRecord, plots: Plots) -> str:
    """What a study concluded: its plot, table and text."""
    found = sweep.study
    if not found:
        return ""
    listing = found.get("table") or {"head": [], "rows": []}
    cells = [[html.escape(str(cell)) for cell in row] for row in listing["rows"]]
    numbers = table([str(cell) for cell in listing["head"]], cells) if cells else ""
    text = html.escape(str(found.get("text") or ""))
    body = f'{numbers}<pre class="config">{text}</pre>'
    title = html.escape(str(found.get("title") or found.get("kind") or "Study"))
    curves = [curve for curve in found.get("curves") or [] if curve.get("points")]
    if not curves:
        return ""
    stems: dict[str, int] = {}
    series = []
    for curve in curves:
        name, points = str(curve["name"]), curve["points"]
        stem, _, role = name.rpartition(", ")
        color = stems.setdefault(stem or name, len(stems))
        held = "held out" in name
        dots = role != "fitted" and len(points) <= 60
        series.append(line(name, color, points, dots=dots, dash=held,
                           line=role != "measured" and len(points) > 1))  # fmt: skip
    log = found.get("log")
    spec: Row = {
        "axes": [str(found.get("x") or "x")],
        "y": str(found.get("y") or "y"),
        "near": True,
        "log": log if isinstance(log, str) else "x" if log else "",
    }
    note = html.escape(spec["y"]).capitalize() + " over " + html.escape(spec["axes"][0]) + "."
    return plots.free("study", title, note, series, body, wide=True, **spec)


def _axis(name: str, title: str, found: Sequence[Any]) -> Row:
    """Values as numbers, or as places in a list of categories; logarithmic where ratios count."""
    known = [value for value in found if value is not None]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in known):
        values = [None if v is None else rounded(float(v)) for v in found]
        log = _by_ratio(sorted(map(float, known)))
        few = sorted({v for v in values if v is not None})
        ticks = few if 1 < len(few) <= _MOST_TICKS else None
        return {"name": name, "title": title, "values": values, "log": log, "categories": None,
                "ticks": ticks}  # fmt: skip
    categories = sorted({spelled(value) for value in known})
    values = [None if v is None else float(categories.index(spelled(v))) for v in found]
    return {"name": name, "title": title, "values": values, "log": False, "categories": categories}


def _by_ratio(values: Sequence[float]) -> bool:
    """Whether values are spread by ratios, as learning rates are: the middle one tells."""
    if not values or values[0] <= 0 or values[-1] < 8 * values[0]:
        return False
    middle = values[len(values) // 2]
    geometric, arithmetic = math.sqrt(values[0] * values[-1]), (values[0] + values[-1]) / 2
    return abs(math.log(middle / geometric)) < abs(math.log(middle / arithmetic))


def spelled(value: Any) -> str:
    """A parameter's value as one types it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.5g}" if isinstance(value, float) else str(value)
