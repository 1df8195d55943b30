"""What a rule measured and the limits it keeps: the common form of the filters that only judge.

A filter yields its measures in the order of its rules, each computed when it is asked for; the
first that breaks its limits drops the document, and all of them are its findings.

    verdict(document, "fineweb", measures)  # Kept(document), or Dropped("fineweb.short_lines")
"""

from collections.abc import Iterable
from typing import NamedTuple

from data_pipeline.document import Document
from data_pipeline.step import Dropped, Finding, Kept, Verdict


class Measure(NamedTuple):
    """One rule's number and what it may be."""

    rule: str
    """Name of the rule, without its stage."""
    value: float
    """What was measured."""
    least: float | None = None
    """Smallest value that passes; None for no such limit."""
    most: float | None = None
    """Largest value that passes; None for no such limit."""

    @property
    def passed(self) -> bool:
        """Whether the value is within the limits."""
        return not (
            (self.least is not None and self.value < self.least)
            or (self.most is not None and self.value > self.most)
        )


def verdict(document: Document, stage: str, measures: Iterable[Measure]) -> Verdict:
    """Keep the document, or drop it for the first measure that breaks its limits."""
    for measure in measures:
        if not measure.passed:
            return Dropped(f"{stage}.{measure.rule}")
    return Kept(document)


def findings(stage: str, measures: Iterable[Measure]) -> list[Finding]:
    """Return every measure in the form that people read."""
    return [
        Finding(f"{stage}.{each.rule}", each.value, _limit(each.least, each.most), each.passed)
        for each in measures
    ]


def _limit(least: float | None, most: float | None) -> str:
    """Say limits in words."""
    if most is None:
        return "no limit" if least is None else f"at least {least:g}"
    return f"at most {most:g}" if least is None else f"{least:g} to {most:g}"


def ratio(count: float, total: float) -> float:
    """Return count / total; 0 of nothing is 0, anything of nothing infinite."""
    if total:
        return count / total
    return float("inf") if count else 0.0
