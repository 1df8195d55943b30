"""What a trial of a study measured, read from its run folder.

Invariant: a trial that is not done, or has no finite loss, is left out with a line that says so; a
fit never sees a number that was not measured.

    runs = measure(trials.run(points))
    runs[0].parameters, runs[0].tokens, runs[0].loss
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain import json_lines
from llmtrain.config.load import build, from_yaml
from llmtrain.config.run import RunConfig
from llmtrain.errors import DataError
from llmtrain.model.parameters import num_parameters
from llmtrain.run.directory import RunDirectory
from llmtrain.sweep.record import Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A trial that is done."""

    overrides: tuple[str, ...]
    """What it sets."""
    folder: str
    """Name of its run folder."""
    loss: float
    """Its objective: by default the last held-out loss, the mean over sources, in nats."""
    sources: dict[str, float]
    """Last held-out loss by source; empty where the run does not evaluate."""
    parameters: int
    """Parameters that multiply, the head among them, the input embedding not."""
    tokens: int
    """Training tokens."""
    lr: float
    """Peak learning rate."""
    batch_tokens: int
    """Tokens of a step."""


def measure(trials: Sequence[Trial]) -> list[Measured | None]:
    """Read trials in their order; None where one has no loss."""
    return [_measured(trial) for trial in trials]


def done(trials: Sequence[Trial]) -> list[Measured]:
    """Read the trials that have a loss."""
    return [run for run in measure(trials) if run is not None]


def required(trial: Trial, what: str) -> Measured:
    """Read a trial that a study cannot do without.

    Raises:
        DataError: it has no loss.
    """
    found = _measured(trial)
    if found is None:
        raise DataError(
            f"{what}, {trial.folder}, ended as {trial.state} without a loss; "
            f"{trial.folder / 'logs'} says why"
        )
    return found


def _measured(trial: Trial) -> Measured | None:
    if trial.state != "done" or trial.value is None:
        logger.warning(
            "%s (%s) has no loss and is left out of the fit",
            trial.folder.name, trial.state,
        )  # fmt: skip
        return None
    run = RunDirectory(trial.folder)
    config = build(RunConfig, from_yaml(run.config_yaml.read_text(encoding="utf-8")))
    sources: dict[str, float] = {}
    for row in json_lines.read(run.metrics_jsonl):
        sources = row.get("validation_loss") or sources
    return Measured(
        overrides=trial.overrides,
        folder=trial.folder.name,
        loss=trial.value,
        sources=sources,
        parameters=num_parameters(config.model, embedding=False),
        tokens=config.training.num_steps * config.training.global_batch_tokens,
        lr=config.optimizer.lr,
        batch_tokens=config.training.global_batch_tokens,
    )
