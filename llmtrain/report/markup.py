"""Pieces of HTML and spellings of numbers that the pages of runs and of benchmarks share."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources


def document(title: str, body: str, plots: Mapping[str, object]) -> str:
    """A whole page that loads nothing; ``plots`` is what its script draws, by element."""
    template = resources.files("llmtrain.report").joinpath("page.html").read_text(encoding="utf-8")
    data = json.dumps(plots, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"title": html.escape(title), "plots": data, "body": body}
    for name, value in parts.items():
        template = template.replace(f"<!--{name}-->", value, 1)
    return template


def card(title: str, note: str, body: str, wide: bool = False) -> str:
    """A titled card."""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{title}</h2><p>{note}</p>{body}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways where it is too wide; cells are HTML already."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def folded(listing: str, title: str = "Numbers") -> str:
    """Something that opens on a click."""
    return f"<details><summary>{title}</summary>{listing}</details>"


def number(value: float | None) -> str:
    """A number in at most four significant digits."""
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def short(value: float) -> str:
    """A count with k, M or B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}"


def clock(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
