"""The funnel: what every stage took, kept and dropped, and why, as a table and as JSON.

``OUT/funnel.json`` has one entry per stage, or per step of a pass, with all reasons; the table
names the largest three.

    write_funnel(Path("corpus"), rows); print(render(rows))
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.manifest import Counts, Manifest
from data_pipeline.report.record import by_size
from data_pipeline.stages import replace_file

_TOP_REASONS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class FunnelRow:
    """One stage of the funnel."""

    stage: str
    """Name of the stage, or of the step of a pass, with the number of the stage."""
    documents_in: int
    """Documents read."""
    documents_out: int
    """Documents that go on."""
    dropped: dict[str, int]
    """Documents dropped, by reason."""
    quarantined: dict[str, int]
    """Records that could not be read, by reason."""
    deleted: dict[str, int]
    """Characters deleted from documents that go on, by rule."""
    text_bytes: int
    """UTF-8 bytes of the documents that go on."""
    tokens: int
    """Tokens written."""
    seconds: float
    """Wall time of the call that finished the stage."""


def make_row(stage: str, counts: Counts, seconds: float) -> FunnelRow:
    """Return the row of a stage."""
    return FunnelRow(
        stage=stage, documents_in=counts.documents_in, documents_out=counts.documents_out,
        dropped=by_size(counts.dropped), quarantined=by_size(counts.quarantined),
        deleted=by_size(counts.deleted), text_bytes=counts.bytes_out, tokens=counts.tokens,
        seconds=seconds,
    )  # fmt: skip


def make_rows(manifest: Manifest, timing: Mapping[str, Any]) -> list[FunnelRow]:
    """Return the rows of a stage: one, or one per step of a pass, in the order they ran in.

    ``timing`` is the stage's ``timing.json``: its wall time is shared out by the processor time
    of the steps.
    """
    seconds = float(timing.get("seconds", 0.0))
    steps = manifest.details.get("steps")
    if not steps:
        return [make_row(manifest.stage, manifest.counts, seconds)]
    used = timing.get("steps", {})
    total = sum(used.values()) or 1.0
    number, _, names = manifest.stage.partition("-")
    return [
        FunnelRow(
            stage=f"{number}-{name}", documents_in=counts["documents_in"],
            documents_out=counts["documents_out"], dropped=by_size(counts["dropped"]),
            quarantined={}, deleted=by_size(counts["deleted"]), text_bytes=counts["bytes_out"],
            tokens=0, seconds=seconds * used.get(name, 0.0) / total,
        )
        for name, counts in ((name, steps[name]) for name in names.split("+") if name in steps)
    ]  # fmt: skip


def write_funnel(out: Path, rows: Sequence[FunnelRow]) -> None:
    """Write ``funnel.json``."""
    content = {"stages": [asdict(row) for row in rows]}
    replace_file(out / "funnel.json", json.dumps(content, indent=1) + "\n")


def summarise(row: FunnelRow) -> str:
    """One stage in one line."""
    share = 100 * row.documents_out / row.documents_in if row.documents_in else 0.0
    text = f"{row.stage}: {row.documents_out:,} of {row.documents_in:,} documents ({share:.1f} %)"
    rate = row.documents_in / row.seconds if row.seconds else 0.0
    tokens = f", {row.tokens:,} tokens" if row.tokens else ""
    return f"{text}{tokens}, {row.seconds:.1f} s, {rate:,.0f} documents/s"


def render(rows: Sequence[FunnelRow]) -> str:
    """The funnel as a table of text."""
    header = ("stage", "in", "kept", "kept %", "text MB", "s", "dropped, by reason")
    body = [
        (
            row.stage,
            f"{row.documents_in:,}",
            f"{row.documents_out:,}",
            f"{100 * row.documents_out / max(1, row.documents_in):.1f}",
            f"{row.text_bytes / 1e6:.2f}",
            f"{row.seconds:.1f}",
            _reasons(row),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(header) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *body)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _reasons(row: FunnelRow) -> str:
    reasons = {**row.dropped, **row.quarantined}
    shown = [f"{reason} {number:,}" for reason, number in list(reasons.items())[:_TOP_REASONS]]
    rest = sum(list(reasons.values())[_TOP_REASONS:])
    if rest:
        shown.append(f"others {rest:,}")
    if row.tokens:
        shown.append(f"{row.tokens:,} tokens")
    return ", ".join(shown)
