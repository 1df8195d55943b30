"""The page of a sweep: the best trial, plots of all trials, what a study concluded, the table.

text = render(read_sweep(Path("runs/lr")))
"""

import html
from collections import Counter

from llmtrain.report import trial_plots
from llmtrain.report.markup import (
    card,
    clock,
    document,
    header,
    number,
    table,
    tiles,
)
from llmtrain.report.plot_card import Plots
from llmtrain.report.sweep_record import SweepRecord, TrialRecord
from llmtrain.report.trial_plots import spelled


def render(sweep: SweepRecord) -> str:
    """Return the page."""
    plots = Plots()
    against = trial_plots.parameters(sweep, plots)
    sections = [
        trial_plots.study(sweep, plots),
        trial_plots.parallel(sweep, plots),
        *against,
        trial_plots.history(sweep, plots, wide=len(against) % 2 == 0),
        trial_plots.losses(sweep, plots),
        _trials(sweep),
        _command(sweep),
    ]
    top = [_header(sweep), _tiles(sweep)]
    body = "\n".join([*top, '<div class="cards">', *sections, "</div>"])
    return document(f"{sweep.path.resolve().name} · llmtrain sweep", body, plots.specs)


def _header(sweep: SweepRecord) -> str:
    counts = Counter(trial.state for trial in sweep.trials)
    badge = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    kind = "" if set(counts) <= {"done", "pruned"} else "stopped"
    found = (("sweeper", sweep.sweeper), ("launcher", sweep.launcher))
    facts = [f"{len(sweep.trials)} trials over {', '.join(sweep.parameters) or 'nothing'}"]
    facts.append(f"{sweep.metric}, {'more' if sweep.maximize else 'less'} is better")
    facts += [f"{name} {value}" for name, value in found if value]
    return header(sweep.path.resolve().name, badge, kind, facts)


def _tiles(sweep: SweepRecord) -> str:
    """The best trial and how far the sweep has come."""
    order, done = sweep.judged, sum(trial.state == "done" for trial in sweep.trials)
    started = [t.started for t in sweep.trials if t.started is not None]
    ended = [t.ended for t in sweep.trials if t.ended is not None]
    took = clock(max(ended) - min(started)) if started and ended else "–"
    cells = [("Trials", f"{done} of {len(sweep.trials)}", "done, of those started"),
             ("Time", took, "from the first start to the last end")]  # fmt: skip
    if order:
        best, names = order[0], sweep.short_names()
        setting = ", ".join(f"{names[n]} {spelled(v)}" for n, v in best.overrides.items())
        note = html.escape(f"trial {best.number}: {setting}")
        cells.insert(0, (f"Best {html.escape(sweep.metric)}", number(best.value), note))
        judged = [trial.value or 0.0 for trial in order]
        middle = number(judged[len(judged) // 2])
        cells.insert(1, ("Median", middle, f"worst {number(judged[-1])}"))
    return tiles(cells)


def _trials(sweep: SweepRecord) -> str:
    """Every trial; sorted by the objective, those without one at the end."""
    short, order = sweep.short_names(), sweep.judged
    best = order[0].number if order else None
    listed = [*order, *(trial for trial in sweep.trials if trial.value is None)]
    head = ["trial", "state", sweep.metric, *(short[p] for p in sweep.parameters)]
    rows = [_row(sweep, trial, trial.number == best) for trial in listed]
    note = "Click a heading to sort; parallel coordinates choose which are listed."
    listing = table([*head, "training loss", "step", "minutes", "ended"], rows, sort=True)
    return card("Trials", note, listing, wide=True)


def _row(sweep: SweepRecord, trial: TrialRecord, best: bool) -> list[str]:
    """Cells of one trial."""
    kind = "best-row" if best else ""
    value = number(trial.value) if trial.value is None else f"{trial.value:.5g}"
    settings = [trial.overrides.get(name) for name in sweep.parameters]
    step = f"{trial.rows.last['step']:,}" if trial.rows.num_rows else "–"
    return [
        f'<span class="{kind}" data-trial="{trial.number}">{trial.number}</span>',
        f'<span class="state {html.escape(trial.state)}">{html.escape(trial.state)}</span>',
        f'<span class="best">{value}</span>' if best else value,
        *(html.escape("–" if setting is None else spelled(setting)) for setting in settings),
        number(trial.loss()),
        step,
        "–" if (minutes := trial.minutes()) is None else f"{minutes:.2f}",
        html.escape(trial.reason or "–"),
    ]


def _command(sweep: SweepRecord) -> str:
    """The command that continues the sweep."""
    if not sweep.command:
        return ""
    note = "The same command again goes on with what is not finished."
    return card("Command", note, f'<pre class="command">{html.escape(sweep.command)}</pre>', True)
