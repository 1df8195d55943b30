"""Which documents had the highest loss: the losses a run kept of chosen steps, and whose they are.

A file that is not of the batch the plan tells is refused.

    loss, stretch = worst_of(run, 11)[0]
    mean_of(worst_of(run, 11))
"""

import math

from llmtrain.data.document_loss import (
    DocumentLoss,
    document_losses_path,
    read_document_losses,
    worst,
)
from llmtrain.data.trace import Stretch, numbered, step_content
from llmtrain.errors import DataError
from llmtrain.trace.run import TracedRun

Ranked = list[tuple[DocumentLoss, Stretch]]
"""Losses with the stretches they are of, the highest loss first."""


def worst_of(run: TracedRun, step: int, rows: range | None = None) -> Ranked:
    """Return the documents in rows of 0-based step ``step``, by default all, the worst first.

    Raises:
        DataError: their losses were not kept, or are those of another batch.
    """
    losses = read_document_losses(run.directory.path, step + 1)
    if not losses:
        raise DataError(
            f"the losses of the documents of step {step + 1} were not kept; move the checkpoints "
            f"of step {step + 1} and later out of {run.directory.checkpoints} and start the run "
            f"again with 'monitor.document_loss_steps=[{step + 1}]'"
        )
    stretches = numbered(step_content(run.plan, step))
    for loss in losses:
        stretch = stretches.get((loss.row, loss.document))
        if stretch is None or not _agree(run, loss, stretch):
            path = document_losses_path(run.directory.path, step + 1)
            raise DataError(
                f"{path} is of another batch than step {step + 1} has today: row {loss.row} has no "
                f"document {loss.document} of {loss.source} with {loss.targets:,.0f} targets; "
                "delete it"
            )
    chosen = [loss for loss in losses if rows is None or loss.row in rows]
    return [(loss, stretches[loss.row, loss.document]) for loss in worst(chosen)]


def mean_of(ranked: Ranked) -> float:
    """Return the mean loss of the targets; not a number where that of a document is not finite."""
    losses = [loss for loss, _ in ranked]
    total = sum(loss.targets * (math.nan if loss.loss is None else loss.loss) for loss in losses)
    return total / sum(loss.targets for loss in losses)


def _agree(run: TracedRun, loss: DocumentLoss, stretch: Stretch) -> bool:
    """Whether a loss can be that of a stretch: its source, and a target for all but the last."""
    first, end = run.store(stretch.source).document_span(stretch.document)
    targets = stretch.tokens[1] - stretch.tokens[0] - (stretch.tokens[1] == end - first)
    same = loss.targets == targets if run.config.data.fim is None else loss.targets <= targets
    return same and loss.source == run.plan.source_names[stretch.source]
