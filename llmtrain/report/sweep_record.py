"""What a sweep left on disk, read for its report: its plan, its trials, their losses, a study.

sweep = read_sweep(Path("runs/lr"))
sweep.best.value, sweep.parameters
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain import json_lines
from llmtrain.errors import ConfigError
from llmtrain.report.columns import Columns, Row, read_columns
from llmtrain.report.record import read_json
from llmtrain.report.series import last

_CURVE_FIELDS = ("step", "tokens", "step_time_s", "loss", "validation_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One point of a sweep and what came of it."""

    number: int
    """From 0, in the order of the starts."""
    folder: str
    """Its run folder, in the sweep's folder."""
    overrides: Row
    """Value by parameter."""
    state: str
    """running, done, failed, stopped or pruned."""
    value: float | None
    """Its objective; None where it has none."""
    started: float | None
    """Seconds since the epoch."""
    ended: float | None
    """Seconds since the epoch; None while it runs."""
    rows: Columns
    """Step, tokens, time and losses of its metrics; empty where it wrote none."""
    evaluated: bool
    """Whether it has held-out losses: they are the objective where none is named."""
    reason: str
    """Why it ended, by its ``status.json``; empty where there is none."""

    def minutes(self) -> float | None:
        """Minutes from its first start to its end."""
        if self.started is None or self.ended is None:
            return None
        return (self.ended - self.started) / 60

    def loss(self) -> float | None:
        """Its last training loss."""
        return last(self.rows.column("loss"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """One sweep as its files tell it."""

    path: Path
    """Its folder."""
    command: str
    """The command line that continues it; empty if unknown."""
    sweeper: str
    """Name of the sweeper; empty if unknown."""
    launcher: str
    """Name of the launcher; empty if unknown."""
    metric: str
    """Name of the objective."""
    maximize: bool
    """Whether more of it is better."""
    parameters: list[str]
    """Names that the trials differ in."""
    trials: list[TrialRecord]
    """In order of their numbers; at least one."""
    study: Row
    """``study.json``; empty where no study wrote one."""

    @property
    def judged(self) -> list[TrialRecord]:
        """Trials that have an objective, the best first."""
        known = [trial for trial in self.trials if trial.value is not None]
        return sorted(known, key=lambda t: t.value or 0.0, reverse=self.maximize)

    def shades(self) -> dict[int, float]:
        """Place of every judged trial among them, by number: 0 is the best, 1 the worst."""
        order = self.judged
        return {t.number: i / max(1, len(order) - 1) for i, t in enumerate(order)}

    def short_names(self) -> dict[str, str]:
        """The ends of the parameters' names that tell them apart."""
        found = {}
        for name in self.parameters:
            parts = name.split(".")
            ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
            others = [other for other in self.parameters if other != name]
            found[name] = next(
                (end for end in ends if not any(f".{o}".endswith(f".{end}") for o in others)), name
            )
        return found


def is_sweep(path: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return (path / "sweep.json").is_file()


def read_sweep(path: Path) -> SweepRecord:
    """Read a sweep's folder.

    Raises:
        ConfigError: a file is not what a sweep writes, or no trial has started yet.
    """
    plan = read_json(path / "sweep.json", {})
    if not isinstance(plan, dict):
        raise ConfigError(f"{path / 'sweep.json'} holds no object; start the sweep again")
    last = {row["number"]: row for row in _lines(path / "trials.jsonl")}
    if not last:
        raise ConfigError(
            f"{path / 'trials.jsonl'} holds no trial yet; report once one has started"
        )
    trials = [_trial(path, last[number]) for number in sorted(last)]
    objective = plan.get("objective") or {}
    default = "held-out loss" if any(trial.evaluated for trial in trials) else "training loss"
    command = plan.get("command") or ""
    return SweepRecord(
        path=path,
        command=command if isinstance(command, str) else shlex.join(["llmtrain", *command]),
        sweeper=str(plan.get("sweeper") or ""),
        launcher=str(plan.get("launcher") or ""),
        metric=str(objective.get("metric") or default),
        maximize=objective.get("direction") == "maximize",
        parameters=_parameters(plan.get("parameters") or (), trials),
        trials=trials,
        study=read_json(path / "study.json", {}),
    )


def _lines(path: Path) -> list[Row]:
    """Lines of ``trials.jsonl``."""
    rows = json_lines.read(path)
    for at, row in enumerate(rows, 1):
        if missing := {"number", "overrides", "state"} - set(row):
            raise ConfigError(
                f"{path}:{at} holds no {', '.join(sorted(missing))}; expected a line of a sweep: "
                "number, folder, overrides, state, value"
            )
    return rows


def _parameters(planned: Sequence[str], trials: Sequence[TrialRecord]) -> list[str]:
    """The planned names and those the trials set beside them."""
    return list(dict.fromkeys([*planned, *(name for t in trials for name in t.overrides)]))


def _trial(path: Path, row: Row) -> TrialRecord:
    folder = path / str(row.get("folder") or f"trial-{row['number']:03d}")
    status: Any = read_json(folder / "status.json", {})
    rows = read_columns(folder / "metrics.jsonl", _CURVE_FIELDS)
    return TrialRecord(
        number=int(row["number"]),
        folder=folder.name,
        overrides=row["overrides"],
        state=str(row["state"]),
        value=row.get("value"),
        started=row.get("started"),
        ended=row.get("ended"),
        rows=rows,
        evaluated=bool(rows.names("validation_loss")),
        reason=str(status.get("reason", "")).replace("_", " "),
    )
