"""What happened to a run: marks in its plots, starts as bands, and the list.

plots = Plots(**events.shared(record))
body += events.listing(record)
"""

import html
from collections import Counter
from datetime import UTC, datetime

from llmtrain.report.columns import Columns, Row
from llmtrain.report.markup import card, table
from llmtrain.report.record import RunRecord

BAD = ("skipped_step", "spike", "rollback", "hang", "out_of_memory", "save_failed", "failed")
_QUIET = ("start", "done")
_MOST_MARKS = 60
_MOST_LISTED = 200


def shared(record: RunRecord) -> Row:
    """``marks`` and ``bands`` of every plot over the steps of a run."""
    marked = [one for one in record.events if one["kind"] not in _QUIET]
    if len(marked) > _MOST_MARKS:  # skipped steps come in hundreds and say little one by one
        marked = [one for one in marked if one["kind"] != "skipped_step"][-_MOST_MARKS:]
    marks = [[int(one["step"]), _spelled(one["kind"]), one["kind"] in BAD] for one in marked]
    if not any(one["kind"] == "resumed" for one in record.events):
        marks += [[step, "resumed", False] for step in record.resumed]
    return {"marks": sorted(marks), "bands": _bands(record.rows)}


def _bands(rows: Columns) -> list[list[int]]:
    """First and last step of every second attempt, from the last step of the one before."""
    bands: list[list[int]] = []
    before, at = 0, 0.0
    pairs = zip(rows.column("step").tolist(), rows.column("attempt").tolist(), strict=True)
    for step, attempt in pairs:
        if attempt % 2 == 0:
            if at != attempt:
                bands.append([before, int(step)])
            bands[-1][1] = int(step)
        at, before = attempt, int(step)
    return bands


def listing(record: RunRecord) -> str:
    """The card that lists the events; empty where the run wrote none."""
    if not record.events:
        return ""
    rows = []
    for one in record.events[-_MOST_LISTED:]:
        kind = one["kind"]
        look = "bad" if kind in BAD else "done" if kind == "done" else ""
        rows.append([
            _time(one.get("time")), f"{int(one['step']):,}", str(one.get("attempt") or "–"),
            f'<span class="state {look}">{html.escape(_spelled(kind))}</span>',
            html.escape(str(one.get("text") or "")),
        ])  # fmt: skip
    counts = Counter(_spelled(one["kind"]) for one in record.events)
    note = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    if len(record.events) > _MOST_LISTED:
        note += f"; the last {_MOST_LISTED} are listed"
    head = ["time (UTC)", "step", "attempt", "event", "what happened"]
    listing = f'<div class="events">{table(head, rows, sort=True)}</div>'
    return card("Events", f"{html.escape(note)}.", listing, wide=True)


def _spelled(kind: str) -> str:
    return str(kind).replace("_", " ")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return datetime.fromtimestamp(float(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")
