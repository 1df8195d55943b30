"""What is known of one document, and how it reads on a terminal.

sys.stdout.write(render(explained))
"""

from dataclasses import dataclass

from data_pipeline.document import Document
from data_pipeline.report.trail import Stored
from data_pipeline.step import Finding

_HEAD = 400
"""Characters of the text that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What one step or stage did with a document, or would have done."""

    name: str
    """Name of the step or stage."""
    stage: str
    """Folder of its stage."""
    outcome: str
    """What happened, in words."""
    findings: tuple[Finding, ...] = ()
    """What its rules measured."""

    @property
    def place(self) -> str:
        """Name with the number of its stage, as in the funnel."""
        return f"{self.stage.partition('-')[0]}-{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """What is known of one document."""

    document: Document
    """The document as it was extracted."""
    events: tuple[Event, ...]
    """Steps and stages in their order."""
    reason: str
    """Why it was dropped, or nothing."""
    dropped_at: str
    """Step that dropped it, with the number of its stage, or nothing."""
    stored: Stored | None
    """Its place in a token store."""
    raw_file: str
    """The file it was read from."""
    text: str
    """Its text as it was last."""

    @property
    def verdict(self) -> str:
        """Where it is now, in one sentence."""
        if self.reason:
            return f"dropped in {self.dropped_at}: {self.reason}"
        if self.stored is not None:
            return (
                f"kept: document {self.stored.number:,} of {self.stored.store}/{self.stored.part}, "
                f"{self.stored.record.num_tokens:,} tokens"
            )
        return f"kept up to {self.events[-1].place}; there is no token store of it yet"

    @property
    def origin(self) -> str:
        """Where it came from, in one line."""
        d = self.document
        when = f", {d.timestamp}" if d.timestamp else ""
        place = f"{self.raw_file} at {d.member_offset:,} (+{d.member_length:,})"
        return (
            f"{d.source}, {place}{when}, text by {d.extractor.name} {d.extractor.version}".strip()
        )

    @property
    def head(self) -> str:
        """The beginning of its text."""
        return self.text[:_HEAD] + ("…" if len(self.text) > _HEAD else "")


def shown(value: float | str) -> str:
    """A measured value, numbers in at most four significant digits."""
    if isinstance(value, str):
        return value
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.4g}"


def render(explained: Explained) -> str:
    """Return the page of one document as text."""
    d = explained.document
    lines = [d.url or "(no address)", f"id {d.id}", explained.origin, "", explained.verdict, ""]
    width = max(len(event.place) for event in explained.events)
    lines += [f"{event.place:<{width}}  {event.outcome}" for event in explained.events]
    rules = [(f.rule, shown(f.value), f.limit, "ok" if f.passed else "FAILS")
             for event in explained.events for f in event.findings]  # fmt: skip
    if rules:
        head = ("rule", "measured", "limit", "")
        widths = [max(len(row[i]) for row in (head, *rules)) for i in range(4)]
        lines += ["", *(_row(row, widths) for row in (head, *rules))]
    lines += ["", *(f"| {line}".rstrip() for line in explained.head.splitlines())]
    return "\n".join(lines) + "\n"


def _row(row: tuple[str, ...], widths: list[int]) -> str:
    rule, value, limit, passed = row
    cells = (rule.ljust(widths[0]), value.rjust(widths[1]), limit.ljust(widths[2]), passed)
    return "  ".join(cells).rstrip()
