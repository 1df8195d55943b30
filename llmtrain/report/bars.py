"""The report's bars, which need no script: mixture, bits per byte, the funnel of the data."""

import html
from collections.abc import Iterable, Sequence

from llmtrain.report.columns import Row
from llmtrain.report.markup import card, folded, table
from llmtrain.report.record import RunRecord


def mixture(record: RunRecord) -> str:
    """Planned share of each source beside what was trained on."""
    realised = record.realised()
    total = sum(realised.values())
    if not total:
        return ""
    bars, rows = [], []
    for name, tokens in realised.items():
        color = f"var(--c{record.color(name) % 8})"
        share, plan = tokens / total, record.planned.get(name)
        planned = "–" if plan is None else f"{plan:.2%}"
        rows.append([html.escape(name), planned, f"{share:.2%}", f"{tokens:,}"])
        lines = [bar([(share, color)], f"{name}: {share:.2%} of {total:,} tokens")]
        if plan is not None:
            pale = f"color-mix(in srgb, {color} 40%, transparent)"
            lines.insert(0, bar([(plan, pale)], f"{name}: {plan:.2%} planned"))
        bars.append(bar_group(name, f"{planned} planned, {share:.2%} seen", lines))
    listing = table(["source", "planned", "seen", "target tokens"], rows)
    note = "Planned share of the tokens (pale) and the share trained on (full)."
    return card("Mixture", note, f'<div class="bars">{"".join(bars)}</div>{folded(listing)}')


def bits_per_byte(record: RunRecord) -> str:
    """Bits per byte on whole held-out documents beside the two simplest models."""
    scores = {name: score for name, score in record.evaluation.items() if isinstance(score, dict)}
    if not scores:
        return ""
    widest = max(score["uniform_bits_per_byte"] for score in scores.values())
    bars, rows = [], []
    for name, score in scores.items():
        lines = [
            bar([(score[key] / widest, color)], f"{name}, {label}: {score[key]:.3f} bits per byte")
            for key, label, color in _MODELS
        ]
        ratio = score["bits_per_byte"] / score["unigram_bits_per_byte"]
        values = " / ".join(f"{score[key]:.2f}" for key, *_ in _MODELS)
        bars.append(bar_group(name, values, lines))
        numbers = [f"{score[key]:.3f}" for key, *_ in _MODELS]
        counts = [f"{score[key]:,}" for key in ("documents", "tokens", "bytes")]
        rows.append([html.escape(name), *numbers, f"{ratio:.3f}", *counts])
    head = ["source", *(label for _, label, _ in _MODELS), "model / unigram"]
    listing = table([*head, "documents", "tokens", "bytes"], rows)
    keys = "".join(
        f'<span class="key"><i class="swatch" style="background:{color}"></i>{label}</span>'
        for _, label, color in _MODELS
    )
    note = f"Whole held-out documents, after step {record.evaluation.get('step', '?')}."
    body = f'<div class="legend">{keys}</div><div class="bars">{"".join(bars)}</div>'
    return card("Bits per byte", note, f"{body}{folded(listing)}")


_MODELS = (
    ("uniform_bits_per_byte", "uniform", "var(--lost)"),
    ("unigram_bits_per_byte", "unigram", "var(--c4)"),
    ("bits_per_byte", "model", "var(--c0)"),
)


def funnel(record: RunRecord) -> str:
    """Documents that each stage of the data pipeline kept, and why the others went."""
    stages = [stage for stage in record.funnel if stage["documents_in"]]
    if not stages:
        return ""
    first = max(stage["documents_in"] for stage in stages)
    bars, rows = [], []
    for stage in stages:
        name = str(stage["stage"]).split("-", 1)[-1].replace("_", " ")
        kept, before = stage["documents_out"], stage["documents_in"]
        tip = f"{name}: {kept:,} of {before:,} documents kept ({kept / before:.1%})"
        line = bar([(kept / first, "var(--c0)"), ((before - kept) / first, "var(--lost)")], tip)
        bars.append(bar_group(name, f"{kept:,} of {before:,}", [line, _reasons(stage)]))
        text = f"{stage['text_bytes'] / 1e6:.2f}" if stage["text_bytes"] else "–"
        tokens = f"{stage['tokens']:,}" if stage["tokens"] else "–"
        seconds = f"{stage['seconds']:.1f}"
        rows.append([html.escape(name), f"{before:,}", f"{kept:,}", text, tokens, seconds])
    listing = table(["stage", "documents in", "kept", "text MB", "tokens", "seconds"], rows)
    note = "Documents kept by each stage (full) and dropped there (pale), with the reasons."
    body = f'<div class="bars">{"".join(bars)}</div>{folded(listing)}'
    return card("Data funnel", note, body, wide=True)


def _reasons(stage: Row) -> str:
    """Why documents went, with their numbers."""
    reasons = {**stage["dropped"], **stage["quarantined"]}
    listed = (f"<span>{html.escape(name)} {count:,}</span>" for name, count in reasons.items())
    return f'<div class="chips">{"".join(listed)}</div>' if reasons else ""


def bar_group(name: str, value: str, lines: Iterable[str]) -> str:
    """A named row of bars."""
    head = f"<span>{html.escape(name)}</span><span>{html.escape(value)}</span>"
    return f'<div><div class="bar-name">{head}</div>{"".join(lines)}</div>'


def bar(parts: Sequence[tuple[float, str]], tip: str) -> str:
    """One bar of parts (share of the width, color)."""
    inner = "".join(
        f'<i style="width:{100 * share:.2f}%;background:{color}"></i>' for share, color in parts
    )
    return f'<div class="bar" data-tip="{html.escape(tip)}">{inner}</div>'
