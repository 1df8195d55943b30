"""Ends trials that are worse than the median of earlier ones, by the rows they write on the way.

Invariant: what is decided depends on the rows alone, not on when they were read: every twentieth
of a run is one report, and other trials count once their round is told.

    Trials(...).run(points, Pruning(study, numbers, objective).watch)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from optuna.study import Study
from optuna.trial import Trial

from llmtrain import json_lines
from llmtrain.sweep.objective import Objective, number


class Pruning:
    """Reports of the trials of one round."""

    REPORTS: ClassVar[int] = 20
    """Reports of a whole run."""
    WARM_UP: ClassVar[int] = 4
    """Reports before the first decision."""

    def __init__(self, study: Study, numbers: Sequence[int], objective: Objective) -> None:
        """Take the study and which of its trials run."""
        self._objective = objective
        frozen = study.trials
        self._trials = [Trial(study, frozen[n]._trial_id) for n in numbers]
        self._reported = [set(frozen[n].intermediate_values) for n in numbers]
        self._over = [
            bool(seen) and trial.should_prune()
            for seen, trial in zip(self._reported, self._trials, strict=True)
        ]
        self._sizes = [0] * len(numbers)

    def watch(self, place: int, run: Path) -> bool:
        """Report what is new in a run; whether to end it."""
        path = run / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if self._over[place] or size == self._sizes[place]:
            return self._over[place]
        self._sizes[place] = size
        metric = self._objective.metric or _default(run)
        trial, reported = self._trials[place], self._reported[place]
        for row in json_lines.read(path):
            report, value = self._report(row), number(row, metric)
            if value is None or report == 0 or report in reported:
                continue
            trial.report(value, report)
            reported.add(report)
            if trial.should_prune():
                self._over[place] = True
                break
        return self._over[place]

    def _report(self, row: dict[str, Any]) -> int:
        """Twentieths of the run that are done."""
        return int(self.REPORTS * row["step"] / row["num_steps"])


def _default(run: Path) -> str:
    """The loss that stands for the objective on the way: held-out where the run evaluates."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    evaluates = config["evaluation"]["every_steps"] is not None and config["data"]["validation"]
    return "validation_loss" if evaluates else "loss"
