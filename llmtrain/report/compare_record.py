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

from llmtrain.errors import ConfigError
from llmtrain.report.record import read_json, read_rows, read_tree
from llmtrain.report.series import Row, column, median, step_seconds

_NOT_SETTINGS = ("name", "runs_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What the comparison needs of one run."""

    name: str
    """Name of its folder, longer where two folders have one name."""
    rows: list[Row]
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
        return sum(step_seconds(self.rows))

    def held_out(self) -> list[float | None]:
        """Held-out loss over all sources, by row: the mean over their tokens."""
        return [held_out(row) for row in self.rows]

    def numbers(self) -> dict[str, float | None]:
        """The numbers it ended with, by the keys of ``compare_page``."""
        known = [value for value in self.held_out() if value is not None]
        losses = [value for value in column(self.rows, "loss") if value is not None]
        score = self.evaluation.get("all") or {}
        return {
            "loss": losses[-1] if losses else None,
            "held_out": known[-1] if known else None,
            "bits_per_byte": score.get("bits_per_byte"),
            "tokens": self.rows[-1]["tokens"],
            "tokens_per_s": median(column(self.rows, "tokens_per_s")),
            "mfu": median(column(self.rows, "mfu")),
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


def held_out(row: Row) -> float | None:
    """Held-out loss of a row over all its sources: the mean over their tokens."""
    losses = {k: v for k, v in (row.get("validation_loss") or {}).items() if v is not None}
    counts = row.get("validation_tokens") or {}
    weights = [float(counts.get(source) or 1.0) for source in losses]
    if not losses:
        return None
    total = sum(w * float(v) for w, v in zip(weights, losses.values(), strict=True))
    return total / sum(weights)


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
