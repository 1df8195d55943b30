"""A planned run as one self-contained HTML page: shares and epochs over tokens, and the numbers.

It has the style of the pipeline's report and loads nothing, so it can be mailed or archived.

    Path("plan.html").write_text(render(planned))
"""

import html
from collections.abc import Sequence
from itertools import pairwise

from data_pipeline.report.markup import (
    card,
    color,
    count,
    folded,
    histogram,
    legend,
    page,
    short,
    table,
    tile,
)
from data_pipeline.report.mixture import MANY_EPOCHS, Planned


def render(planned: Planned) -> str:
    """Return the page."""
    cards = [_shares(planned), _epochs(planned), _phases(planned), _steps(planned)]
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in (*planned.warnings, *planned.notes))
    body = [
        f"<header><h1>Planned mixture</h1><p>{html.escape(planned.kind)} mixture of "
        f"{count(len(planned.sources), 'source')}; nothing has been trained.</p>{lines}</header>",
        _tiles(planned),
        f'<div class="cards">{"".join(cards)}</div>',
    ]
    return page("Planned mixture · llmtrain-data", "\n".join(body))


def _tiles(planned: Planned) -> str:
    most = max(planned.sources, key=lambda source: source.epochs)
    stored = sum(source.num_tokens for source in planned.sources)
    tiles = [
        tile("Tokens", short(planned.num_tokens), f"of {short(stored)} in the stores"),
        tile("Steps", f"{planned.num_steps:,}", f"{planned.stages[-1].tokens_per_step:,} tokens"),
        tile("Phases", f"{len(planned.phases):,}", f"windows of {planned.sequence_length:,}"),
        tile("Most epochs", f"{most.epochs:.2f}", html.escape(most.name)),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _shares(planned: Planned) -> str:
    """Stacked shares over the run, and the sources as a table."""
    names = [source.name for source in planned.sources]
    series = [
        (
            name,
            [
                100 * (after[i] - before[i]) / (end - start)
                for (start, before), (end, after) in pairwise(planned.bins)
            ],
        )
        for i, name in enumerate(names)
    ]
    edges = [short(tokens) for tokens, _ in planned.bins]
    rows = [
        [
            html.escape(s.name), f"{s.share:.2%}", f"{s.planned_tokens:,}", f"{s.num_tokens:,}",
            f"{s.num_windows:,}", f"{s.epochs:.3f}",
        ]
        for s in planned.sources
    ]  # fmt: skip
    head = ["source", "share", "tokens", "in store", "windows of an epoch", "epochs"]
    body = legend(names) + histogram(series, edges, "Shares of the sources over tokens")
    note = "Percent of the training tokens, over tokens."
    return card("Shares", note, body + folded(table(head, rows)), wide=True)


def _epochs(planned: Planned) -> str:
    """How often every source has been read, over tokens."""
    names = [source.name for source in planned.sources]
    lines = [
        [
            given[i] / (source.num_windows * planned.sequence_length)
            for _, given in planned.bins
        ]
        for i, source in enumerate(planned.sources)
    ]  # fmt: skip
    places = [tokens / planned.num_tokens for tokens, _ in planned.bins]
    edges = [short(tokens) for tokens, _ in planned.bins]
    body = legend(names) + _curves(names, lines, places, edges)
    note = f"Cumulative, over tokens; dashed is {MANY_EPOCHS:g} (arXiv:2305.16264)."
    return card("Epochs", note, body, wide=True)


def _curves(
    names: Sequence[str],
    lines: Sequence[Sequence[float]],
    places: Sequence[float],
    edges: Sequence[str],
) -> str:
    """Lines that rise from 0, one for each name; ``places`` are shares of the width."""
    peak = max(max(line) for line in lines) or 1.0
    shapes = [
        f'<polyline points="{_points(places, line, peak)}" fill="none" stroke="{color(i)}" '
        'stroke-width="2" vector-effect="non-scaling-stroke"/>'
        for i, line in enumerate(lines)
    ]
    if peak > MANY_EPOCHS:
        y = 100 - 100 * MANY_EPOCHS / peak
        shapes.append(
            f'<path d="M0 {y:.2f} H1000" stroke="var(--faint)" stroke-dasharray="5 4" '
            'vector-effect="non-scaling-stroke"/>'
        )
    for k, (left, right) in enumerate(pairwise(places), 1):
        read = ", ".join(f"{n} {line[k]:.2f}" for n, line in zip(names, lines, strict=True))
        shapes.append(
            f'<rect class="hit" x="{1000 * left:.2f}" width="{1000 * (right - left):.2f}" y="0" '
            f'height="100" data-tip="{html.escape(f"{edges[k]}: {read}")}"/>'
        )
    marks = "".join(
        f'<span style="left:{100 * places[k]:.2f}%">{edges[k]}</span>'
        for k in range(0, len(places), max(1, round((len(places) - 1) / 5)))
    )
    return (
        f'<div class="histogram"><div class="peak">{peak:.2f}</div>'
        '<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Epochs of the sources over tokens">{"".join(shapes)}</svg>'
        f'<div class="axis">{marks}</div></div>'
    )


def _points(places: Sequence[float], line: Sequence[float], peak: float) -> str:
    pairs = zip(places, line, strict=True)
    return " ".join(f"{1000 * x:.2f},{100 - 100 * y / peak:.2f}" for x, y in pairs)


def _phases(planned: Planned) -> str:
    if not planned.moves:
        return ""
    rows = [
        [
            f"{number}", f"{phase.tokens[0]:,}", f"{phase.tokens[1]:,}",
            f"{phase.steps[0]:,} to {phase.steps[1]:,}", html.escape(source.name),
            f"{phase.first[i]:.2%}", f"{phase.last[i]:.2%}", f"{phase.gives[i]:,}",
            f"{phase.epochs[i]:.3f}",
        ]
        for number, phase in enumerate(planned.phases)
        for i, source in enumerate(planned.sources)
        if phase.gives[i]
    ]  # fmt: skip
    head = ["phase", "from token", "to", "steps", "source", "share", "at its end", "tokens",
            "epochs by then"]  # fmt: skip
    return card("Phases", "What every source gives, phase by phase.", table(head, rows), wide=True)


def _steps(planned: Planned) -> str:
    if len(planned.stages) == 1:
        return ""
    rows = [
        [
            f"{s.steps[0]:,} to {s.steps[1]:,}", f"{s.tokens_per_step:,}",
            f"{s.tokens_per_step // s.sequence_length:,}", f"{s.sequence_length:,}",
            f"{s.tokens[1]:,}",
        ]
        for s in planned.stages
    ]  # fmt: skip
    head = ["steps", "tokens per step", "rows", "tokens per row", "to token"]
    return card("Ramps", "Batch and sequence length over the run.", table(head, rows), wide=True)
