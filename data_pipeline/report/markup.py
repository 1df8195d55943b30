"""Pieces of HTML that the sections of a page share: cards, tables, bars, histograms, numbers.

Everything is drawn here, as HTML and inline SVG; the page's script only shows ``data-tip`` texts.
Histograms stretch with the page: their axis labels are HTML, so that text keeps its size.

    bar([(0.8, "var(--c0)"), (0.2, "var(--lost)")], "80 of 100 kept")
"""

import html
from collections.abc import Collection, Iterable, Sequence
from importlib import resources

NUM_COLORS = 8
"""Colors of the template, ``--c0`` to ``--c7``."""


def page(title: str, body: str) -> str:
    """Return a whole page with this body, in the looks of the trainer's reports."""
    text = resources.files("data_pipeline.report").joinpath("page.html").read_text("utf-8")
    style = resources.files("llmtrain.report").joinpath("page.css").read_text("utf-8")
    for name, value in (("title", html.escape(title)), ("style", style), ("body", body)):
        text = text.replace(f"<!--{name}-->", value, 1)
    return text


def card(title: str, note: str, body: str, wide: bool = False) -> str:
    """A titled card; the title and the note are HTML already."""
    kind = "card wide" if wide else "card"
    return f'<section class="{kind}"><h2>{title}</h2><p>{note}</p>{body}</section>'


def tile(label: str, value: str, note: str) -> str:
    """One large number."""
    return f'<div class="tile"><span>{label}</span><b>{value}</b><small>{note}</small></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: Collection[str] = ()) -> str:
    """A table that scrolls sideways where it is too wide; cells are HTML already.

    The columns whose heads are in ``texts`` hold words, not numbers, and may break.
    """
    kinds = [' class="text"' if name in texts else "" for name in head]
    top = "".join(f"<th{k}>{html.escape(cell)}</th>" for k, cell in zip(kinds, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{k}>{cell}</td>' for k, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def folded(listing: str, title: str = "Numbers") -> str:
    """Something that opens on a click."""
    return f"<details><summary>{title}</summary>{listing}</details>"


def code(text: str) -> str:
    """A name as it stands in files."""
    return f"<code>{html.escape(text)}</code>"


def color(index: int) -> str:
    """Color of the source or series with this number."""
    return f"var(--c{index % NUM_COLORS})"


def legend(names: Sequence[str]) -> str:
    """Names beside their colors; nothing for one alone."""
    if len(names) < 2:
        return ""
    keys = "".join(
        f'<span class="key"><i class="swatch" style="background:{color(i)}"></i>'
        f"{html.escape(name)}</span>"
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{keys}</div>'


def named_bar(
    name: str, value: str, parts: Sequence[tuple[float, str]], tip: str = "", below: str = ""
) -> str:
    """A bar with its name and its value above; the name and what is below are HTML already."""
    head = f"<span>{name}</span><span>{html.escape(value)}</span>"
    return f'<div><div class="bar-name">{head}</div>{bar(parts, tip)}{below}</div>'


def bar(parts: Sequence[tuple[float, str]], tip: str = "") -> str:
    """One bar of parts (share of the width, color)."""
    inner = "".join(
        f'<i style="width:{100 * share:.2f}%;background:{paint}"></i>' for share, paint in parts
    )
    about = f' data-tip="{html.escape(tip)}"' if tip else ""
    return f'<div class="bar"{about}>{inner}</div>'


def bars(lines: Iterable[str]) -> str:
    """Bars under one another."""
    return f'<div class="bars">{"".join(lines)}</div>'


def histogram(
    series: Sequence[tuple[str, Sequence[float]]],
    edges: Sequence[str],
    label: str,
    outline: tuple[str, Sequence[float]] | None = None,
    names: Sequence[str] | None = None,
) -> str:
    """Stacked columns, one color per series, and the outline of another histogram behind them.

    ``edges`` name the borders of the columns, one more than there are columns; ``names`` the
    columns, where "from – to" would be wrong.
    """
    number = len(edges) - 1
    totals = [sum(values[i] for _, values in series) for i in range(number)]
    peak = max([*totals, *(outline[1] if outline else [])], default=0) or 1
    shapes: list[str] = []
    for i in range(number):
        place = names[i] if names else f"{edges[i]} – {edges[i + 1]}"
        tip, top = f"{place}: {totals[i]:,.0f}", 100.0
        for n, (name, values) in enumerate(series):
            height = 100 * values[i] / peak
            top -= height
            if height:
                shapes.append(
                    f'<rect x="{i + 0.04:.2f}" width=".92" y="{top:.2f}" '
                    f'height="{height:.2f}" fill="{color(n)}"/>'
                )
            if values[i] and len(series) > 1:
                tip += f", {name} {values[i]:,.0f}"
        if outline:
            tip += f"; {outline[0]} {outline[1][i]:,.0f}"
        shapes.append(
            f'<rect class="hit" x="{i}" width="1" y="0" height="100" '
            f'data-tip="{html.escape(tip)}"/>'
        )
    line = _outline(outline[1], peak) if outline else ""
    return (
        f'<div class="histogram"><div class="peak">{peak:,.0f}</div>'
        f'<svg viewBox="0 0 {number} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(label)}">{line}{"".join(shapes)}</svg>{_axis(edges)}</div>'
    )


def _outline(values: Sequence[float], peak: float) -> str:
    points = [f"M0 100 L0 {100 - 100 * values[0] / peak:.2f}"]
    for i, value in enumerate(values):
        y = 100 - 100 * value / peak
        points.append(f"L{i} {y:.2f} L{i + 1} {y:.2f}")
    return f'<path class="outline" d="{" ".join(points)} L{len(values)} 100"/>'


def _axis(edges: Sequence[str]) -> str:
    """About six labels below a histogram."""
    last = len(edges) - 1
    step = max(1, round(last / 5))
    labels = [
        f'<span style="left:{100 * i / last:.2f}%">{html.escape(edges[i])}</span>'
        for i in range(0, last + 1, step)
    ]
    return f'<div class="axis">{"".join(labels)}</div>'


def short(value: float) -> str:
    """A count with k, M, B or T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes with a decimal unit."""
    for unit_bytes, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit_bytes:
            return f"{value / unit_bytes:.3g} {unit}"
    return f"{value:,.0f} B"


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(part: float, whole: float) -> str:
    """A share in percent."""
    if not whole:
        return "–"
    return f"{100 * part / whole:.1f} %" if not 0 < part / whole < 0.0005 else "under 0.1 %"


def clock(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
