"""The trials of a sweep as a table for the console, best first.

print(table(record.trials, objective))
"""

from collections.abc import Sequence

from llmtrain.sweep.objective import Objective
from llmtrain.sweep.record import Trial, figure, named


def table(trials: Sequence[Trial], objective: Objective) -> str:
    """One row per trial: objective, time from start to end, what it sets, its state."""
    names = list(dict.fromkeys(name for trial in trials for name in named(trial.overrides)))
    short = {name: _short(name, names) for name in names}
    head = ["trial", objective.metric or "loss", *short.values(), "time", "state"]
    rows = [head]
    for trial in sorted(trials, key=lambda t: (objective.key(t.value), t.number)):
        values = named(trial.overrides)
        rows.append([
            trial.folder.name,
            figure(trial.value),
            *(figure(values[name]) if name in values else "-" for name in names),
            _time(trial),
            trial.state,
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _short(name: str, names: Sequence[str]) -> str:
    """The last part of a name where no other ends in it."""
    last = name.rpartition(".")[2]
    return last if sum(n.rpartition(".")[2] == last for n in names) == 1 else name


def _time(trial: Trial) -> str:
    if trial.started is None or trial.ended is None:
        return "-"
    seconds = round(trial.ended - trial.started)
    return f"{seconds // 60}:{seconds % 60:02d}"
