"""Which checkpoints stay: the newest, every n-th step, the best by held-out loss.

Invariant: the newest whole one always stays, and what is deleted vanishes before its files do.

    keep = Keep.of(config.checkpoint)
    retire(folder, keep, up_to_step=1000)
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import archive
from llmtrain.config.training import CheckpointConfig


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


def _score(path: Path, metric: str) -> float | None:
    try:
        score = json.loads((path / archive.META).read_bytes())["scores"][metric]
    except (OSError, ValueError, KeyError):
        return None
    return float(score)
