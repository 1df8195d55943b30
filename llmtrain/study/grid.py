"""Learning rate against batch: a grid, a parabola for each batch, one run at the least loss.

Near its best rate the loss is a parabola in the log of the rate; three rates around the least
measured one tell its bottom.

Invariant: a bottom beyond the grid is said to be beyond it and is never extrapolated.

    bottom = parabola([1e-3, 2e-3, 4e-3], [3.31, 3.27, 3.30])
    bottom.rate, bottom.loss, bottom.inside
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmtrain.config.study import LrBatchStudy
from llmtrain.errors import DataError
from llmtrain.study.findings import Curve, Findings, Table, count, error
from llmtrain.study.ladder import RunPoints
from llmtrain.study.measured import Measured, done, required


@dataclass(frozen=True, slots=True)
class Bottom:
    """Where the loss is least."""

    rate: float
    """Learning rate."""
    loss: float
    """Loss there, nats per token."""
    inside: bool
    """Whether rates on both sides are worse; else it is the least measured one, at an end."""


def parabola(rates: Sequence[float], losses: Sequence[float]) -> Bottom:
    """Find the bottom of losses over rates.

    Raises:
        DataError: fewer than three rates, or a loss that is none.
    """
    if len(set(rates)) < 3 or not np.isfinite(losses).all():
        raise DataError(
            f"a curve over learning rates needs at least 3 rates with a finite loss, found "
            f"{dict(zip(rates, losses, strict=True))}; add rates below those that diverge"
        )
    order = np.argsort(rates)
    x, y = np.log(np.asarray(rates)[order]), np.asarray(losses)[order]
    least = int(np.argmin(y))
    if least in (0, len(y) - 1):
        return Bottom(float(np.exp(x[least])), float(y[least]), inside=False)
    near = slice(least - 1, least + 2)
    a, b, c = np.polyfit(x[near] - x[least], y[near], 2)
    return Bottom(float(np.exp(x[least] - b / (2 * a))), float(c - b * b / (4 * a)), inside=True)


def lr_batch(config: LrBatchStudy, run: RunPoints) -> Findings:
    """Train the grid, find each batch's best rate, train at the best of all, compare.

    Where that is at an end of the grid nothing is foretold.

    Raises:
        DataError: a batch has fewer than three rates with a loss.
    """
    points = [
        [f"training.global_batch_tokens={batch}", f"optimizer.lr={rate:g}"]
        for batch in config.batch_tokens
        for rate in config.learning_rates
    ]
    runs = done(run(points))
    by_batch = {b: [r for r in runs if r.batch_tokens == b] for b in config.batch_tokens}
    bottoms = {b: parabola([r.lr for r in own], [r.loss for r in own])
               for b, own in by_batch.items()}  # fmt: skip
    batch = min(bottoms, key=lambda b: bottoms[b].loss)
    best = bottoms[batch]
    tables = [_grid_table(config, runs), _bottoms_table(bottoms)]
    if best.inside:
        (trial,) = run([[f"training.global_batch_tokens={batch}", f"optimizer.lr={best.rate:.3g}"]])
        tables.append(_held_out_table(best, required(trial, "the run at the best rate")))
    return Findings(
        kind=config.kind,
        title=f"Learning rate and batch: {len(runs)} runs",
        tables=tables,
        sentences=_sentences(bottoms),
        curves=[
            Curve(f"batch of {count(b)} tokens", sorted((r.lr, r.loss) for r in own))
            for b, own in by_batch.items()
        ],
        x="learning rate",
    )


def _held_out_table(best: Bottom, run: Measured) -> Table:
    row = [run.folder, count(run.batch_tokens), f"{run.lr:.3g}", f"{best.loss:.4f}",
           f"{run.loss:.4f}", error(best.loss, run.loss)]  # fmt: skip
    head = ["held-out run", "batch", "lr", "predicted", "measured", "error"]
    return Table("predicted against measured", head, [row])


def _grid_table(config: LrBatchStudy, runs: Sequence[Measured]) -> Table:
    losses = {(r.batch_tokens, r.lr): f"{r.loss:.4f}" for r in runs}
    rows = [
        [count(batch), *(losses.get((batch, rate), "-") for rate in config.learning_rates)]
        for batch in config.batch_tokens
    ]
    head = ["batch", *(f"lr {rate:g}" for rate in config.learning_rates)]
    return Table("held-out loss", head, rows)


def _bottoms_table(bottoms: dict[int, Bottom]) -> Table:
    rows = [
        [count(batch), f"{b.rate:.3g}", f"{b.loss:.4f}", "yes" if b.inside else "no, at its end"]
        for batch, b in bottoms.items()
    ]
    return Table("best rate of each batch", ["batch", "lr", "loss", "inside the grid"], rows)


def _sentences(bottoms: dict[int, Bottom]) -> list[str]:
    """How the best rate grows with the batch, where the grid tells."""
    inside = {batch: b.rate for batch, b in bottoms.items() if b.inside}
    found = []
    if len(inside) > 1:
        power = np.polyfit(np.log(list(inside)), np.log(list(inside.values())), 1)[0]
        found.append(f"The best rate grows with the batch to the power {power:.2f}.")
    if len(inside) < len(bottoms):
        found.append("Where the best rate is at an end of the grid, the true one is beyond it.")
    return found
