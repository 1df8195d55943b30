"""A step decides about one document at a time: keep it (changed or not) or drop it with a reason.

Steps are pure and know nothing of files, shards or workers; ``execute.py`` runs them. What needs to
see many documents at once (deduplication) is a keyed stage there, not a step.
"""

from dataclasses import dataclass, field
from typing import Protocol

from data_pipeline.document import Document


@dataclass(frozen=True, slots=True)
class Kept:
    """The document goes on."""

    document: Document
    """The document, as the step leaves it."""
    deleted: dict[str, int] = field(default_factory=dict)
    """Characters deleted per rule name, when the step edits text."""
    inserted: int = 0
    """Characters inserted: before = after + sum(deleted) - inserted, in characters."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """The document stops here."""

    reason: str
    """Short rule name, such as ``c4.few_sentences``; the funnel counts by it."""


Verdict = Kept | Dropped


class Step(Protocol):
    """A named, picklable rule over single documents."""

    @property
    def name(self) -> str:
        """Name in manifests and in the funnel."""
        ...

    def __call__(self, document: Document) -> Verdict:
        """Judge one document."""
        ...
