"""The cards about what was lost: funnel, sources, reasons with samples, deletions, time.

funnel(contents)   # HTML of one card; an empty string where there is nothing to tell
"""

import html
from collections import Counter
from collections.abc import Iterable

from data_pipeline.report.collect import Contents
from data_pipeline.report.markup import (
    bars,
    card,
    clock,
    code,
    color,
    count,
    folded,
    legend,
    named_bar,
    percent,
    size,
    table,
)
from data_pipeline.report.record import Row, StageRecord
from data_pipeline.report.survey import Sample

_CHIPS = 8
"""Reasons shown below a bar of the funnel."""


def funnel(contents: Contents) -> str:
    """Documents that every step kept and dropped."""
    rows = contents.record.rows
    if not rows:
        return ""
    first = rows[0].documents_in
    lines = []
    for row in rows:
        gone = row.documents_in - row.documents_out
        share = percent(row.documents_out, row.documents_in)
        tip = f"{row.name}: {row.documents_out:,} of {row.documents_in:,} documents kept ({share})"
        parts = [(row.documents_out / first, "var(--c0)"), (gone / first, "var(--lost)")]
        value = f"{row.documents_out:,} of {row.documents_in:,}"
        lines.append(named_bar(html.escape(row.name), value, parts, tip, _chips(row)))
    cells = (
        [
            code(row.name), f"{row.documents_in:,}", f"{row.documents_out:,}",
            percent(row.documents_out, row.documents_in), percent(row.documents_out, first),
            size(row.bytes_out) if row.bytes_out else "–", html.escape(row.stage),
        ]
        for row in rows
    )  # fmt: skip
    head = ["step", "documents in", "kept", "of these", "of all", "text after it", "stage"]
    note = "Documents that every step kept (full) and dropped (pale), with the reasons."
    return card("Funnel", note, bars(lines) + folded(table(head, cells)), wide=True)


def _chips(row: Row) -> str:
    shown = list(row.dropped.items())
    listed = [f"<span>{html.escape(name)} {count:,}</span>" for name, count in shown[:_CHIPS]]
    if rest := shown[_CHIPS:]:
        listed.append(f"<span>{len(rest)} others {sum(n for _, n in rest):,}</span>")
    return f'<div class="chips">{"".join(listed)}</div>' if listed else ""


def by_source(contents: Contents) -> str:
    """Share of documents that every step kept, by source."""
    rows = [row for row in contents.record.rows if row.sources]
    if len(contents.sources) < 2 or not rows:
        return ""
    first, last = rows[0].sources, rows[-1].sources
    cells = [
        [code(row.name), *(_heat(*row.sources.get(s, (0, 0))) for s in contents.sources)]
        for row in rows
        if any(row.sources.get(s, (0, 0))[0] != row.sources.get(s, (0, 0))[1] for s in first)
    ]
    ends = (
        f"<b>{percent(last.get(s, (0, 0))[1], first.get(s, (0, 0))[0])}</b>"
        for s in contents.sources
    )
    cells.append(["<b>of all records</b>", *ends])
    listing = table(["step", *contents.sources], cells)
    note = "Share of its documents that every step kept; the more color, the more went."
    lines = [
        named_bar(
            html.escape(s), f"{last.get(s, (0, 0))[1]:,} of {first.get(s, (0, 0))[0]:,}",
            [(last.get(s, (0, 0))[1] / max(1, first.get(s, (0, 0))[0]), color(i))],
        )
        for i, s in enumerate(contents.sources)
    ]  # fmt: skip
    return card("By source", note, bars(lines) + listing, wide=True)


def _heat(came: int, went_on: int) -> str:
    """A share with a bar of what was lost behind it."""
    if not came:
        return "–"
    lost = 1 - went_on / came
    tip = f"{came - went_on:,} of {came:,} dropped"
    return (
        f'<span data-tip="{tip}">{percent(went_on, came)}</span>'
        f'<div class="bar" style="height:4px"><i style="width:{100 * lost:.1f}%;'
        'background:var(--c1)"></i></div>'
    )


def reasons(contents: Contents) -> str:
    """Every reason with its number and some of the documents."""
    found = [(reason, n, row) for row in contents.record.rows for reason, n in row.dropped.items()]
    if not found:
        return ""
    most = max(number for _, number, _ in found)
    lines = []
    for reason, number, row in found:
        by_source = contents.dropped.counts.get(reason, Counter[str]())
        listed = ", ".join(f"{s} {by_source[s]:,}" for s in contents.sources if by_source[s])
        tip = f"{reason}: {number:,} of {row.documents_in:,} documents judged; {listed}"
        value = f"{number:,} · {percent(number, row.documents_in)}"
        seen = by_source.total()
        parts = [
            (number / most * by_source[source] / seen, color(i))
            for i, source in enumerate(contents.sources)
            if by_source[source]
        ] or [(number / most, "var(--lost)")]
        below = _samples(contents.dropped.samples.get(reason, []))
        lines.append(named_bar(code(reason), value, parts, tip.removesuffix("; "), below))
    note = (
        "Documents by the first rule that dropped them, in the order of the steps; the share is of "
        "what the step judged. Samples are those with the smallest ids, which are hashes; the text "
        f"is as it came into the stage. {code('llmtrain-data explain out=DIR doc=ID')} shows every "
        "rule's verdict."
    )
    if contents.dropped.share < 1.0:
        note += f" Colors are of {contents.dropped.share:.1%} of the dropped text."
    content = legend(contents.sources) + bars(lines)
    return card("Why documents went", note, content, wide=True)


def _samples(samples: Iterable[Sample]) -> str:
    figures = [sample(one, gone=True) for one in samples]
    if not figures:
        return ""
    return folded(f'<div class="samples">{"".join(figures)}</div>', count(len(figures), "sample"))


def sample(one: Sample, gone: bool = False) -> str:
    """The beginning of a document, blank lines left out, with its id and address."""
    lines = (line for line in one.text.splitlines() if line.strip())
    text = html.escape("\n".join(lines)) or "<i>(no text)</i>"
    return (
        f'<figure class="sample{" gone" if gone else ""}"><p>{text}</p><figcaption>'
        f"{html.escape(one.source)} · {code(one.id)} · {html.escape(one.url)}</figcaption></figure>"
    )


def deletions(contents: Contents) -> str:
    """Characters that rules deleted from documents that went on."""
    found = [(rule, n, row) for row in contents.record.rows for rule, n in row.deleted.items()]
    if not found:
        return ""
    most = max(number for _, number, _ in found)
    lines = [
        named_bar(code(rule), f"{number:,}", [(number / most, "var(--c4)")],
                  f"{row.name}: {number:,} characters")
        for rule, number, row in found
    ]  # fmt: skip
    note = "Characters deleted from documents that went on, by rule."
    return card("Deleted text", note, bars(lines))


def _steps(stage: StageRecord) -> str:
    """Processor time of the steps of a pass, where there are several."""
    if len(stage.step_seconds) < 2:
        return ""
    used = sorted(stage.step_seconds.items(), key=lambda item: -item[1])
    listed = (f"<span>{html.escape(name)} {clock(value)}</span>" for name, value in used)
    return f'<div class="chips">{"".join(listed)}</div>'


def seconds(contents: Contents) -> str:
    """Wall time of the stages."""
    stages = [stage for stage in contents.record.stages if stage.seconds]
    if not stages:
        return ""
    most, total = max(s.seconds for s in stages), sum(s.seconds for s in stages)
    lines = []
    for stage in stages:
        rate = stage.manifest.counts.bytes_in / stage.seconds
        value = clock(stage.seconds) + (f" · {size(rate)}/s" if rate else "")
        tip = f"{stage.name}: {percent(stage.seconds, total)} of {clock(total)}"
        parts = [(stage.seconds / most, "var(--c5)")]
        lines.append(named_bar(html.escape(stage.name), value, parts, tip, _steps(stage)))
    note = (
        f"{clock(total)} in all, of the calls that finished the stages; bytes are of text that "
        "came in. Below a pass, the processor time of its steps. Work before an interruption is "
        "not counted."
    )
    return card("Time", note, bars(lines))
