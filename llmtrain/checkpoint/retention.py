"""Which checkpoints stay: the newest, every n-th step, the best by held-out loss.

A run that goes back, or trusts what it has saved no longer, begins another line of history: a
line is the steps it has gone back to so far, in order, and every checkpoint keeps that of its time.

Invariant: the newest whole one always stays, and what is deleted vanishes before its files do.

    keep = Keep.of(config.checkpoint)
    retire(folder, keep, up_to_step=1000)
    undone(20, [], by=[15])                # True: it was saved before the run went back to 15
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import archive
from llmtrain.config.training import CheckpointConfig

LINE = "line"
"""What ``meta.json`` calls the line of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The rule; a checkpoint stays that any part of it keeps."""

    last: int
    """Newest ones."""
    every_steps: int | None = None
    """Multiples of this step."""
    best: int = 0
    """Those with the lowest score."""
    metric: str = "validation_loss"
    """Name of the score."""

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Keep":
        """The rule of a configuration."""
        return cls(
            last=config.keep_last, every_steps=config.keep_every_steps,
            best=config.keep_best, metric=config.best_metric,
        )  # fmt: skip

    def kept(self, steps: Iterable[int], scores: Mapping[int, float]) -> set[int]:
        """Those of ``steps`` that stay; ``scores`` are of the steps that have one."""
        newest = sorted(steps, reverse=True)
        stay = set(newest[: max(1, self.last)])
        if self.every_steps is not None:
            stay.update(step for step in newest if step % self.every_steps == 0)
        scored = sorted((scores[step], -step) for step in newest if step in scores)
        return stay.union(-negative for _, negative in scored[: self.best])


def retire(directory: Path, keep: Keep, up_to_step: int, busy: Collection[Path] = ()) -> None:
    """Delete the checkpoints of at most ``up_to_step`` that the rule does not keep, nor ``busy``.

    The one of ``up_to_step`` has just been committed.
    """
    found = {step: path for step, path in archive.scan(directory) if step <= up_to_step}
    scores = {
        step: score
        for step, path in (found.items() if keep.best else ())
        if (score := _score(path, keep.metric)) is not None
    }
    for step in found.keys() - keep.kept(found, scores):
        if found[step] not in busy:
            archive.remove(found[step])


def undone(step: int, line: Sequence[int], by: Sequence[int]) -> bool:
    """Whether the checkpoint of ``step`` and ``line`` is undone in the history of line ``by``.

    A line that is no beginning of the other is of another run, of which nothing is known here.
    """
    later = by[len(line) :]
    return bool(later) and list(by[: len(line)]) == list(line) and step > min(later)


def current(lines: Mapping[int, Sequence[int]]) -> set[int]:
    """Those of the steps, each with its line, that none of the others has undone."""
    known = {tuple(line) for line in lines.values()}
    return {step for step, line in lines.items() if not any(undone(step, line, o) for o in known)}


def _score(path: Path, metric: str) -> float | None:
    try:
        score = json.loads((path / archive.META).read_bytes())["scores"][metric]
    except (OSError, ValueError, KeyError):
        return None
    return float(score)
