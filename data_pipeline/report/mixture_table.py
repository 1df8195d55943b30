"""A planned run on a terminal: shares, tokens and epochs of the sources, phases and ramps.

Phases are told only where shares move, ramps only where there are some.

    sys.stdout.write(table(planned))
"""

from collections.abc import Sequence

from data_pipeline.report.markup import count
from data_pipeline.report.mixture import Planned

MOST_PHASES = 16
"""More are not printed one by one: an adaptive mixture makes one of every decision."""


def table(planned: Planned) -> str:
    """Return what is printed."""
    whole = (
        f"{planned.num_tokens:,} tokens in {count(planned.num_steps, 'step')}, {planned.kind} "
        f"mixture of {count(len(planned.sources), 'source')}"
    )
    parts = [whole, _aligned(_source_rows(planned))]
    if planned.moves:
        phases = f"{len(planned.phases):,} phases: plot= and json= tell each"
        if len(planned.phases) <= MOST_PHASES:
            phases = _aligned(_phase_rows(planned), 2)
        parts += [_aligned(_point_rows(planned)), phases]
    if len(planned.stages) > 1:
        parts.append(_aligned(_stage_rows(planned)))
    parts += [f"note: {note}" for note in planned.notes]
    return "\n\n".join(parts) + "\n"


def _source_rows(planned: Planned) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("source", "share", "tokens", "of store", "epochs")]
    return rows + [
        (s.name, f"{s.share:.2%}", f"{s.planned_tokens:,}", f"{s.num_tokens:,}", f"{s.epochs:.3f}")
        for s in planned.sources
    ]


def _point_rows(planned: Planned) -> list[tuple[str, ...]]:
    rows = [("share at token", *(f"{tokens:,}" for tokens, _ in planned.points))]
    return rows + [
        (source.name, *(f"{shares[i]:.2%}" for _, shares in planned.points))
        for i, source in enumerate(planned.sources)
    ]


def _phase_rows(planned: Planned) -> list[tuple[str, ...]]:
    """One row for each source of each phase that gives something."""
    rows: list[tuple[str, ...]] = [
        ("phase", "source", "to token", "steps", "share", "tokens", "epochs by then")
    ]
    for number, phase in enumerate(planned.phases):
        head = f"{phase.tokens[1]:,}", f"{phase.steps[0]:,}-{phase.steps[1]:,}"
        for i, source in enumerate(planned.sources):
            if phase.gives[i]:
                share = f"{phase.first[i]:.2%}"
                if phase.first[i] != phase.last[i]:
                    share += f" -> {phase.last[i]:.2%}"
                gives, epochs = f"{phase.gives[i]:,}", f"{phase.epochs[i]:.3f}"
                rows.append((f"{number}", source.name, *head, share, gives, epochs))
    return rows


def _stage_rows(planned: Planned) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("steps", "tokens per step", "rows", "of tokens", "to token")]
    return rows + [
        (
            f"{s.steps[0]:,}-{s.steps[1]:,}", f"{s.tokens_per_step:,}",
            f"{s.tokens_per_step // s.sequence_length:,}", f"{s.sequence_length:,}",
            f"{s.tokens[1]:,}",
        )
        for s in planned.stages
    ]  # fmt: skip


def _aligned(rows: Sequence[Sequence[str]], num_names: int = 1) -> str:
    """Rows as columns: the first ``num_names`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < num_names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
