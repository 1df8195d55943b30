"""What a training run would read: shares, tokens and epochs of every source, before it begins.

All of it comes from the batch plan that training itself makes, so a plan that training would refuse
is refused here. Nothing is read of the stores but their manifests and headers; no torch.

    mixture(MixturePlanConfig(train=config))    # prints; plot= and json= write files
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from data_pipeline.config.commands import MixturePlanConfig
from llmtrain.config.load import build, from_yaml
from llmtrain.config.mixture import AdaptiveMixture
from llmtrain.config.run import DATA_RULES, RunConfig
from llmtrain.data.journal import Journal, read_journal
from llmtrain.data.location import absolute
from llmtrain.data.phases import ShareSchedule
from llmtrain.data.plan import BatchPlan, SourcePlan, plan_of
from llmtrain.data.store import TokenStore, open_source
from llmtrain.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MANY_EPOCHS = 4.0
"""Reading a source more often teaches clearly less than as much new text (arXiv:2305.16264)."""
NUM_POINTS = 5
"""Places of the run whose shares are told."""
NUM_BINS = 60
"""Parts of the run in the plot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPhase:
    """A phase of the mixture, as far as the run reaches."""

    tokens: tuple[int, int]
    """Training tokens [start, end)."""
    steps: tuple[int, int]
    """First and last step, from 1 on; a phase may begin inside a step."""
    first: tuple[float, ...]
    """Share of each source at its beginning."""
    last: tuple[float, ...]
    """And at its end."""
    gives: tuple[int, ...]
    """Tokens of each source in it."""
    epochs: tuple[float, ...]
    """How often each source has been read by its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSteps:
    """Steps of one shape: a stage of the ramps, or what follows them."""

    steps: tuple[int, int]
    """First and last, from 1 on."""
    tokens: tuple[int, int]
    """Training tokens [start, end)."""
    tokens_per_step: int
    """Tokens of a step."""
    sequence_length: int
    """Tokens of a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Everything that is told of a run."""

    kind: str
    """Kind of the mixture."""
    num_tokens: int
    """Training tokens of the run, in whole windows."""
    num_steps: int
    """Its optimizer steps."""
    sequence_length: int
    """Tokens of a window."""
    sources: tuple[SourcePlan, ...]
    """What every source gives."""
    points: tuple[tuple[int, tuple[float, ...]], ...]
    """Tokens seen and the shares of the sources there, from the beginning to the end."""
    phases: tuple[PlannedPhase, ...]
    """Phases in order; one where the shares never change."""
    stages: tuple[PlannedSteps, ...]
    """Shapes of the steps in order; one where there is no ramp."""
    bins: tuple[tuple[int, tuple[int, ...]], ...]
    """Tokens seen and those of each source among them, at the edges of equal parts of the run."""
    notes: tuple[str, ...]
    """What the numbers mean where that is not plain."""
    warnings: tuple[str, ...]
    """What is allowed and probably not wanted."""

    @property
    def moves(self) -> bool:
        """Whether the shares are others at some place of the run."""
        return len({shares for phase in self.phases for shares in (phase.first, phase.last)}) > 1


def mixture(config: MixturePlanConfig) -> int:
    """``llmtrain-data mixture``.

    Raises:
        ConfigError: every rule of the data that the configuration breaks, or a plan that reads a
            source beyond its cap, or a file that cannot be written there.
        DataError: a store is missing, damaged or too small.
    """
    train, journal = _training(config)
    if problems := [found for rule in DATA_RULES if (found := rule(train, 1)) is not None]:
        raise ConfigError(problems)
    plan = plan_of(train, open_sources(train), journal)
    planned = tell(train, plan)
    for warning in planned.warnings:
        logger.warning("%s", warning)
    if config.plot is not None:
        from data_pipeline.report.mixture_page import render

        _write(config.plot, "plot", (".html", ".htm"), render(planned))
        logger.info("plot: %s", config.plot)
    text = json.dumps(asdict(planned), indent=1) + "\n"
    if config.json == "-":
        sys.stdout.write(text)
        return 0
    if config.json is not None:
        _write(config.json, "json", (".json",), text)
    from data_pipeline.report.mixture_table import table

    sys.stdout.write(table(planned))
    return 0


def _training(config: MixturePlanConfig) -> tuple[RunConfig, Journal | None]:
    """The configuration that was given, or that of a run with what it decided since."""
    if config.train is not None:
        return config.train, None
    folder = Path(str(config.run))
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"run={folder} is no run folder: it has no config.yaml; give the folder that "
            "`llmtrain train` made, or the overrides of a run to come"
        )
    noted = folder / "journal.json"
    journal = read_journal(noted) if noted.is_file() else None
    return build(RunConfig, from_yaml(path.read_text(encoding="utf-8"))), journal


def open_sources(config: RunConfig) -> dict[str, TokenStore]:
    """Open the stores of all sources.

    Raises:
        ConfigError: there is no source, or every store that does not open, by the source's name.
    """
    data, stores, problems = config.data, dict[str, TokenStore](), list[str]()
    if not data.sources:
        problems = ["data.sources names no token store; set data.sources.NAME=DIR"]
    for name, at in sorted(data.sources.items()):
        paths = absolute(at) if isinstance(at, str) else [absolute(path) for path in at]
        try:
            stores[name] = open_source(paths, data.cache_dir)
        except DataError as error:
            problems.append(f"data.sources.{name}: {error}")
    if problems:
        raise ConfigError(problems)
    return stores


def tell(config: RunConfig, plan: BatchPlan) -> Planned:
    """Work out what ``plan`` gives to the run of ``config``."""
    unit = plan.steps.unit_tokens
    num_units = -(-config.training.num_tokens // unit)
    schedule = plan.mixture.schedule
    sources = plan.describe(config.training.num_tokens)
    points = [round((num_units - 1) * i / (NUM_POINTS - 1)) for i in range(NUM_POINTS)]
    edges = [num_units * i // NUM_BINS for i in range(NUM_BINS + 1)]
    return Planned(
        kind=config.mixture.kind,
        num_tokens=num_units * unit,
        num_steps=config.training.num_steps,
        sequence_length=unit,
        sources=sources,
        points=tuple((at * unit, _floats(shares_at(schedule, at))) for at in dict.fromkeys(points)),
        phases=tuple(_phases(plan, num_units)),
        stages=tuple(_stages(plan, config.training.num_steps)),
        bins=tuple(
            (edge * unit, tuple(int(target * unit) for target in schedule.integral(edge)))
            for edge in dict.fromkeys(edges)
        ),
        notes=tuple(_notes(config, sources)),
        warnings=tuple(_warnings(sources)),
    )


def shares_at(schedule: ShareSchedule, window: int) -> list[Fraction]:
    """Return the share of each source at a global window."""
    number = schedule.phase_at(window)
    phase, bends = schedule.phase(number), schedule.bends(number)
    if bends is None:
        return list(phase.first)
    x = 2 * (window - phase.start)
    return [share + bend * x for share, bend in zip(phase.first, bends, strict=True)]


def _phases(plan: BatchPlan, num_units: int) -> list[PlannedPhase]:
    schedule, unit = plan.mixture.schedule, plan.steps.unit_tokens
    starts = [schedule.phase(i).start for i in range(schedule.num_phases)]
    edges = [*sorted({start for start in starts if start < num_units}), num_units]
    sizes = [order.num_windows for order in plan.orders]
    phases = []
    for start, end in pairwise(edges):
        phase = schedule.phase(schedule.phase_at(start))
        before, after = schedule.integral(start), schedule.integral(end)
        known = schedule.end(schedule.phase_at(start))
        last = phase.last if known == end or not phase.linear else shares_at(schedule, end)
        phases.append(PlannedPhase(
            tokens=(start * unit, end * unit),
            steps=(plan.steps.step_of(start) + 1, plan.steps.step_of(end - 1) + 1),
            first=_floats(phase.first), last=_floats(last),
            gives=tuple(int((b - a) * unit) for a, b in zip(before, after, strict=True)),
            epochs=tuple(float(b / size) for b, size in zip(after, sizes, strict=True)),
        ))  # fmt: skip
    return phases


def _stages(plan: BatchPlan, num_steps: int) -> list[PlannedSteps]:
    steps, stages, first = plan.steps, list[PlannedSteps](), 0
    for units, length in steps.shapes():
        end = _end_of_shape(plan, first, num_steps)
        if first < end:
            stages.append(PlannedSteps(
                steps=(first + 1, end), tokens=(steps.tokens(first), steps.tokens(end)),
                tokens_per_step=units * steps.unit_tokens, sequence_length=length,
            ))  # fmt: skip
        first = end
    return stages


def _end_of_shape(plan: BatchPlan, first: int, num_steps: int) -> int:
    """The step after those of the shape that step ``first`` has; found by bisection."""
    low, high = first, num_steps
    while low < high:
        middle = (low + high) // 2
        same = plan.steps.shape(middle)[1:] == plan.steps.shape(first)[1:]
        low, high = (middle + 1, high) if same else (low, middle)
    return low


def _warnings(sources: Sequence[SourcePlan]) -> list[str]:
    often = [f"{s.name} {s.epochs:.3g} times" for s in sources if s.epochs > MANY_EPOCHS]
    if not often:
        return []
    return [
        f"the run reads {', '.join(often)}; beyond about {MANY_EPOCHS:g} times, text that was read "
        "before teaches clearly less than new text (arXiv:2305.16264)"
    ]


def _notes(config: RunConfig, sources: Sequence[SourcePlan]) -> list[str]:
    notes, mixing, count = list[str](), config.mixture, len(sources)
    if config.data.packing != "concat":
        notes.append("tokens are those of whole windows, padding counted")
    if isinstance(mixing, AdaptiveMixture) and count > 1:
        low = mixing.exploration / count
        notes.append(
            f"the shares follow the losses every {mixing.interval_tokens:,} tokens; told are those "
            f"decided so far, later ones are between {low:.2%} and {1 - low * (count - 1):.2%}"
        )
    return notes


def _floats(shares: Sequence[Fraction]) -> tuple[float, ...]:
    return tuple(float(share) for share in shares)


def _write(name: str, field: str, endings: Sequence[str], text: str) -> None:
    path = Path(name)
    if path.suffix not in endings or path.is_dir():
        raise ConfigError(f"{field}={path} has to be a file that ends with {endings[0]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
