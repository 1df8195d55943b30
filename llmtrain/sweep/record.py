"""What a sweep knows of its trials: ``SWEEP/trials.jsonl``, one line for each change of state.

Invariant: the last line of a number is the state of that trial; lines are only added, each is on
the disk before what it tells of goes on, and a point keeps its number and its folder for good.

    record = Record(Path("runs/lr"))
    trial = record.trial_of(["optimizer.lr=1e-3"])    # the same trial whenever it is asked for
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmtrain import json_lines

State = Literal["waiting", "running", "done", "failed", "stopped", "pruned"]
"""``stopped``: interrupted, goes on from its checkpoint; the others as they say."""

FINISHED: tuple[State, ...] = ("done", "failed", "pruned")
"""States of a trial that is not run again."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One point of a sweep and what came of it."""

    number: int
    """Its number in the sweep, from 0."""
    overrides: tuple[str, ...]
    """What it sets beside the words that all trials share."""
    folder: Path
    """Folder of its run."""
    state: State
    """Where it stands."""
    value: float | None = None
    """Its objective; None where it has none."""
    started: float | None = None
    """Seconds since the epoch of its first start."""
    ended: float | None = None
    """Seconds since the epoch of its end."""
    failures: int = 0
    """How often it ended with a fault."""

    @property
    def finished(self) -> bool:
        """Whether it is not run again."""
        return self.state in FINISHED


class Record:
    """The trials of one sweep folder."""

    def __init__(self, folder: Path) -> None:
        """Read what is there; ``folder`` is made."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "trials.jsonl"
        self._trials: dict[str, Trial] = {}
        for row in json_lines.read(self.path):
            self._take(row)

    @property
    def trials(self) -> list[Trial]:
        """All trials by number."""
        return sorted(self._trials.values(), key=lambda trial: trial.number)

    def trial_of(self, overrides: Sequence[str]) -> Trial:
        """The trial of a point; a new one gets the next number."""
        key = _key(named(overrides))
        if key not in self._trials:
            number = max((trial.number for trial in self._trials.values()), default=-1) + 1
            folder = self.folder / f"trial-{number:03d}"
            self._trials[key] = Trial(number, tuple(overrides), folder, "waiting")
        return self._trials[key]

    def change(self, trial: Trial, state: State, value: float | None = None) -> Trial:
        """Note a change of state; gives the trial as it is now."""
        now = time.time()
        changed = replace(
            trial, state=state, value=value,
            started=trial.started or now,
            ended=None if state == "running" else now,
            failures=trial.failures + (state == "failed"),
        )  # fmt: skip
        self._trials[_key(named(trial.overrides))] = changed
        json_lines.append(self.path, {
            "number": trial.number, "folder": trial.folder.name,
            "overrides": named(trial.overrides), "state": state, "value": value,
            "started": changed.started, "ended": changed.ended,
        })  # fmt: skip
        return changed

    def _take(self, row: dict[str, Any]) -> None:
        """Follow one line."""
        key = _key(row["overrides"])
        before = self._trials.get(key)
        self._trials[key] = Trial(
            number=row["number"],
            overrides=before.overrides if before else overrides_of(row["overrides"]),
            folder=self.folder / row["folder"],
            state=row["state"],
            value=row["value"],
            started=row["started"],
            ended=row["ended"],
            failures=(before.failures if before else 0) + (row["state"] == "failed"),
        )


def named(overrides: Sequence[str]) -> dict[str, Any]:
    """Override strings as name -> value, numbers as numbers."""
    pairs = (text.lstrip("+").partition("=") for text in overrides)
    return {name: plain(text) for name, _, text in pairs}


def overrides_of(values: dict[str, Any]) -> tuple[str, ...]:
    """The reverse of ``named``."""
    return tuple(f"{name}={shown(value)}" for name, value in values.items())


def plain(text: str) -> Any:
    """The value a word stands for: null, true, false, a number, or the text itself."""
    known = {"null": None, "true": True, "false": False}
    if text.lower() in known:
        return known[text.lower()]
    for kind in (int, float):
        try:
            found = kind(text)
        except ValueError:
            continue
        return found if found == found and abs(found) != float("inf") else text
    return text


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def figure(value: Any) -> str:
    """A value as a person reads it: five digits, a dash for none."""
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else shown(value)


def _key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)
