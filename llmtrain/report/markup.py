"""Pieces of HTML and spellings of numbers that the pages of runs and of benchmarks share."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

_SCRIPTS = ("draw", "plot", "lines", "heat", "parallel", "page")
"""The page's script, in the order its parts build on each other."""


def document(title: str, body: str, plots: Mapping[str, object]) -> str:
    """A whole page that loads nothing; ``plots`` is what its script draws, by element."""
    folder = resources.files("llmtrain.report")
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    scripts = (folder.joinpath("script", f"{name}.js") for name in _SCRIPTS)
    parts = {
        "title": html.escape(title),
        "style": folder.joinpath("page.css").read_text(encoding="utf-8"),
        "scripts": "".join(
            f"<script>\n{s.read_text(encoding='utf-8')}</script>\n" for s in scripts
        ),
        "plots": json.dumps(plots, separators=(",", ":")).replace("<", "\\u003c"),
        "body": body,
    }
    for name, value in parts.items():
        page = page.replace(f"<!--{name}-->", value, 1)
    return page


def header(title: str, status: str, kind: str, facts: Iterable[str]) -> str:
    """Title, a badge (``kind`` "" is good, "stopped" is not) and facts; all of it plain text."""
    badge = f'<span class="status {kind}">{html.escape(status)}</span>' if status else ""
    line = html.escape(" · ".join(facts))
    return f"<header><h1>{html.escape(title)}{badge}</h1><p>{line}</p></header>"


def tiles(cells: Iterable[tuple[str, str, str]]) -> str:
    """The numbers a reader wants first: label, value and note of each, HTML already."""
    found = (
        f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'
        for label, value, note in cells
    )
    return f'<div class="tiles">{"".join(found)}</div>'


def controls(
    axes: Sequence[str], runs: Sequence[tuple[str, int]] = (), hint: str = "drag to zoom all plots"
) -> str:
    """The bar that rules all linked plots: the horizontal axis, and which runs are drawn."""
    switch = "".join(
        f'<button data-axis="{i}" aria-pressed="{"false" if i else "true"}">{name}</button>'
        for i, name in enumerate(axes)
    )
    keys = "".join(
        f'<button data-series="{html.escape(name)}" aria-pressed="true"><i class="swatch" '
        f'style="--color:var(--c{color % 8})"></i>{html.escape(name)}</button>'
        for name, color in runs
    )
    legend = f'<span class="legend">{keys}</span>' if keys else ""
    quiet = f'<span class="quiet">{hint}</span>' if hint else ""
    body = f'<span class="switch">over {switch}</span>{legend}{quiet}'
    return f'<div class="controls" data-link="run">{body}</div>'


def card(title: str, note: str, body: str, wide: bool = False) -> str:
    """A titled card."""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{title}</h2><p>{note}</p>{body}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], sort: bool = False) -> str:
    """A table that scrolls where it is too wide or long; cells are HTML already.

    With ``sort`` a click on a heading sorts it.
    """
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="sortable"' if sort else ""
    inner = f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll{" long" if sort else ""}" tabindex="0">{inner}</div>'


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
