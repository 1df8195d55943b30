"""The loss of every document in the batch of a step, as a run keeps it for chosen steps.

``RUN/document_loss/step-000000123.jsonl`` belongs to step 123, 1-based as in ``metrics.jsonl``: one
JSON object per document of each row that has a target there, in order of rows and of documents:

    {"row": 4, "document": 0, "source": "wiki", "targets": 511, "loss": 2.918342113494873}

``row`` counts the rows of the global batch [rows, S] of that step, whose S a length ramp may make
shorter than the longest: unit u of the step is cut into rows u * k to u * k + k - 1.
``document`` is the ordinal in the row, as in ``StepBatch.document_ids``. Needs no torch.

Invariant: losses times targets of a file add up to the loss sum of the step, without z-loss, and
targets to its targets; a document in several rows has a line in each.

    for line in worst(read_document_losses(Path("runs/demo"), step=123) or ())[:10]: ...
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtrain.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLoss:
    """What one step's loss was on the part of a document that stands in one row."""

    row: int
    """Row of the global batch, 0-based."""
    document: int
    """Ordinal of the document inside the row, 0-based."""
    source: str
    """Name of the source the row comes from."""
    targets: float
    """Its targets; where targets have weights, their sum."""
    loss: float | None
    """Mean cross entropy of its targets in nats; None where that is not finite."""


def document_losses_path(run: Path, step: int) -> Path:
    """Tell where the losses of 1-based step ``step`` of the run in folder ``run`` are kept."""
    return run / "document_loss" / f"step-{step:09d}.jsonl"


def read_document_losses(run: Path, step: int) -> tuple[DocumentLoss, ...] | None:
    """Read what was kept of 1-based step ``step``; None where nothing was.

    Raises:
        DataError: the file holds something else.
    """
    path = document_losses_path(run, step)
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return tuple(DocumentLoss(**json.loads(line)) for line in lines)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} is damaged, it holds no losses of documents; delete it, the run can go on "
            "without"
        ) from error


def write_document_losses(run: Path, step: int, losses: Iterable[DocumentLoss]) -> Path:
    """Write the file of 1-based step ``step``, whole or not at all; gives its path."""
    path = document_losses_path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    text = "".join(f"{json.dumps(asdict(loss), allow_nan=False)}\n" for loss in losses)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path


def kept_steps(run: Path) -> list[int]:
    """Return the 1-based steps whose losses were kept, rising."""
    names = (path.stem for path in document_losses_path(run, 0).parent.glob("step-*.jsonl"))
    return sorted(int(name.removeprefix("step-")) for name in names)


def worst(losses: Sequence[DocumentLoss]) -> list[DocumentLoss]:
    """Sort by loss, the highest first; a loss that is not finite is higher than any."""
    return sorted(losses, key=lambda found: -math.inf if found.loss is None else -found.loss)
