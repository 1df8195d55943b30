"""Several runs read to stand beside each other; imports no torch.

Their settings stay plain trees, so runs of other versions can be compared too.

    runs = read_several([Path("runs/a"), Path("runs/b")])
    differing(runs)["optimizer.lr"]   # one value per run
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.errors import ConfigError
from llmtrain.report.columns import Columns, Row, Values
from llmtrain.report.record import read_json, read_rows, read_tree
from llmtrain.report.series import last, median, step_seconds

_NOT_SETTINGS = ("name", "runs_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What the comparison needs of one run."""

    name: str
    """Name of its folder, longer where two folders have one name."""
    rows: Columns
    """Rows of its metrics; at least one."""
    settings: dict[str, Any]
    """Its configuration by dotted key."""
    status: Row
    """``status.json``; empty while it trains."""
    evaluation: Row
    """``eval.json``; empty if it was never evaluated."""

    def state(self) -> str:
        """How it ended, or that it trains."""
        return str(self.status.get("reason", "training")).replace("_", " ")

    def seconds(self) -> float:
        """Seconds spent in training steps."""
        return float(step_seconds(self.rows).sum())

    def held_out(self) -> Values:
        """Held-out loss over all sources, by row: the mean over their tokens."""
        return held_out(self.rows)

    def numbers(self) -> dict[str, float | None]:
        """The numbers it ended with, by the keys of ``compare_page``."""
        score = self.evaluation.get("all") or {}
        return {
            "loss": last(self.rows.column("loss")),
            "held_out": last(self.held_out()),
            "bits_per_byte": score.get("bits_per_byte"),
            "tokens": self.rows.last["tokens"],
            "tokens_per_s": median(self.rows.column("tokens_per_s")),
            "mfu": median(self.rows.column("mfu")),
            "minutes": self.seconds() / 60,
        }


def read_several(paths: Sequence[Path]) -> list[RunSummary]:
    """Read run folders.

    Raises:
        ConfigError: fewer than two, one of them twice, or one that holds no run.
    """
    if len(paths) < 2:
        raise ConfigError("run=[] names no run; give one folder or several, as run=[runs/a,runs/b]")
    resolved = [path.resolve() for path in paths]
    if twice := [str(p) for p, r in zip(paths, resolved, strict=True) if resolved.count(r) > 1]:
        raise ConfigError(f"run= names {twice[0]} {len(twice)} times; name every run once")
    return [
        RunSummary(
            name=name,
            settings=dict(flat(read_tree(path))),
            rows=read_rows(path),
            status=read_json(path / "status.json", {}),
            evaluation=read_json(path / "eval.json", {}),
        )
        for name, path in zip(_names(resolved), paths, strict=True)
    ]


def held_out(rows: Columns) -> Values:
    """Held-out loss of every row over all its sources: the mean over their tokens."""
    total, weight = np.zeros(rows.num_rows), np.zeros(rows.num_rows)
    for source in rows.names("validation_loss"):
        losses = rows.inside("validation_loss", source)
        tokens = np.nan_to_num(rows.inside("validation_tokens", source))
        weights = np.where(np.isnan(losses), 0.0, np.where(tokens > 0, tokens, 1.0))
        total += weights * np.nan_to_num(losses)
        weight += weights
    mean: Values = total / np.where(weight > 0, weight, np.nan)
    return mean


def differing(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """Settings that are not alike in all runs: a value per run, "–" where a run has none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = {}
    for key in keys:
        values = ["–" if key not in r.settings else _spelled(r.settings[key]) for r in runs]
        if key not in _NOT_SETTINGS and len(set(values)) > 1:
            found[key] = values
    return found


def flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree by dotted key."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _spelled(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _names(paths: Sequence[Path]) -> list[str]:
    """The ends of the paths that tell them apart."""
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
    return [str(path) for path in paths]
