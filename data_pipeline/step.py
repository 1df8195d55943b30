"""A step decides about one document at a time: keep it (changed or not) or drop it with a reason.

Steps are pure and know nothing of files, shards or workers; ``transform.py`` runs them. What needs
to see many documents at once (deduplication) is a keyed stage, not a step.

    verdict = C4Lines(C4_VARIANTS["c4"])(document)   # Kept(...) or Dropped("c4.few_sentences")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from data_pipeline.config.run import PipelineConfig
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
    """Stage and rule, such as ``c4.few_sentences``; the funnel counts by it."""
    notes: tuple[tuple[str, str], ...] = ()
    """What the step found, as (name, value); it goes into the dropped document's metadata."""


Verdict = Kept | Dropped


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule measured in a document, whether or not another rule had dropped it before."""

    rule: str
    """Stage and rule, as in the reasons of ``Dropped``."""
    value: float | str
    """What was measured."""
    limit: str
    """What the rule asks for, such as ``3 to 10`` or ``at most 0.3``."""
    passed: bool
    """Whether the document meets it."""


class Step(Protocol):
    """A named, picklable rule over single documents."""

    @property
    def name(self) -> str:
        """Name in manifests and in the funnel."""
        ...

    def __call__(self, document: Document) -> Verdict:
        """Judge one document."""
        ...

    def findings(self, document: Document) -> list[Finding]:
        """Return what every rule of the step says of a document, for people to read."""
        ...


@runtime_checkable
class BatchStep(Protocol):
    """A step that judges many documents at once better than one by one."""

    def judge_batch(self, documents: Sequence[Document]) -> list[Verdict]:
        """Judge documents; verdicts in their order, equal to those of single calls."""
        ...


def judge_all(step: Step, documents: Sequence[Document]) -> list[Verdict]:
    """Return a step's verdict on each document."""
    if isinstance(step, BatchStep):
        return step.judge_batch(documents)
    return [step(document) for document in documents]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepKind:
    """How a step comes out of the configuration; every module of a rule has its own."""

    build: Callable[..., Step]
    """Makes the step in a worker from its options; loads models and lists."""
    options: Callable[[PipelineConfig], dict[str, Any] | None]
    """Hashable, picklable arguments of ``build``; None leaves the step out."""
    settings: Callable[[PipelineConfig], dict[str, Any]]
    """What the manifest says: everything that decides the result, digests of lists and versions
    of models included."""
