"""What a study found, as text for the console and as ``SWEEP/study.json`` for the report.

Invariant: both say the same: the file's table and text are those that were printed.

    findings.write(Path("runs/ladder/study.json"))
    print(findings.text())
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.run.directory import write_json


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head, cells as text."""

    title: str
    """One line above it."""
    head: Sequence[str]
    """Names of the columns."""
    rows: Sequence[Sequence[str]]
    """Cells."""

    def text(self) -> str:
        """Columns of equal width, numbers to the right."""
        lines = [list(self.head), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in lines) for i in range(len(self.head))]
        shown = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in lines
        ]
        return "\n".join([f"{self.title}:", *(f"  {line}" for line in shown)])


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one colour in the plot of a study."""

    name: str
    """In the legend."""
    points: Sequence[tuple[float, float]]
    """x and y."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """The outcome of a study."""

    kind: str
    """Kind of the study."""
    title: str
    """One line."""
    tables: Sequence[Table]
    """Runs, constants, predicted against measured; the last is the one the report shows."""
    sentences: Sequence[str] = ()
    """What they say."""
    curves: Sequence[Curve] = ()
    """Of the plot."""
    x: str = ""
    """What the x axis is."""
    y: str = "held-out loss, nats per token"
    """What the y axis is."""
    log: bool = True
    """Whether the x axis is logarithmic."""
    parameters: Sequence[str] = field(default=())
    """Names that the trials differ in."""

    def text(self) -> str:
        """All of it for the console."""
        parts = [self.title, *(table.text() for table in self.tables), *self.sentences]
        return "\n\n".join(parts)

    def write(self, path: Path) -> None:
        """Write ``study.json`` by rename."""
        last = self.tables[-1]
        write_json(path, {
            "kind": self.kind, "title": self.title,
            "text": "\n\n".join([*(t.text() for t in self.tables[:-1]), *self.sentences]),
            "table": {"head": list(last.head), "rows": [list(row) for row in last.rows]},
            "curves": [
                {"name": c.name, "points": [[float(x), float(y)] for x, y in c.points]}
                for c in self.curves
            ],
            "x": self.x, "y": self.y, "log": self.log,
        })  # fmt: skip


def count(value: float) -> str:
    """A size or a number of tokens with three digits: 1.25 M."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def interval(pair: tuple[float, float], digits: int = 3) -> str:
    """Two ends with ``digits`` after the point."""
    return f"{pair[0]:.{digits}f} to {pair[1]:.{digits}f}"


def error(predicted: float, measured: float) -> str:
    """How far a prediction is off, in percent of what was measured."""
    return f"{100 * (predicted / measured - 1):+.2f} %"
