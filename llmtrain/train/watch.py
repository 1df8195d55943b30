"""Everything that watches a run, put together: events, rows, W&B, the ranks' own numbers, hangs.

Invariant: what is here reads and reports; taking it away changes no bit of a run. On ranks but the
first only what takes part in a sum is left of it.

    watch = open_watch(stack, config.monitor, parts, ...)
    hooks = [*watch.before, mixing, *watch.after]
    reason = loop.train(engine, watch.batches, checkpoints=watch.saver, hooks=hooks, ...)
    watch.events.ended(reason)
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from llmtrain.config.training import MonitorConfig
from llmtrain.data.plan import BatchPlan
from llmtrain.engine.protocol import Engine, StepResult
from llmtrain.optim.schedule import Schedule
from llmtrain.parallel.mesh import AXES, World
from llmtrain.run.directory import RunDirectory
from llmtrain.run.progress import Progress
from llmtrain.train import provenance
from llmtrain.train.attention_logits import AttentionLogits
from llmtrain.train.events import Events
from llmtrain.train.feed import Feed
from llmtrain.train.loop import BatchSource, Hook, Saver
from llmtrain.train.metrics import Meter, Metrics, Row
from llmtrain.train.norms import layer_norms
from llmtrain.train.ranks import RankWatch
from llmtrain.train.sinks import open_sinks
from llmtrain.train.stalls import TimedSaves
from llmtrain.train.watchdog import Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The run that is watched."""

    run: RunDirectory
    """Its folder."""
    world: World
    """Its ranks."""
    progress: Progress
    """How far it is."""
    engine: Engine
    """What runs its steps."""
    plan: BatchPlan
    """Its data."""
    batches: Feed
    """Where the loop would pull from."""
    saver: Saver
    """What the loop would save with."""
    schedule: Schedule
    """Learning rate by tokens."""
    meter: Meter
    """Turns tokens into MFU."""
    layers: Sequence[str]
    """Layer of every row of the parameter table (see norms.py)."""
    watchdog: Watchdog
    """Hears of hangs."""
    compiled: bool
    """Whether blocks are compiled."""
    plain_config: Mapping[str, Any]
    """The whole configuration, for whom shows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What the loop is given instead of what it would have unwatched."""

    events: Events
    """Takes what happens."""
    batches: BatchSource
    """Where the loop pulls from."""
    saver: Saver
    """What it saves with."""
    before: tuple[Hook, ...]
    """Hooks before all that take time."""
    after: tuple[Hook, ...]
    """Hooks after all others."""
    report: Callable[[Mapping[str, Any], float], None] | None
    """Puts fields on a row, of which the seconds are not step time; None but on rank 0."""


def open_watch(stack: ExitStack, config: MonitorConfig, parts: Parts) -> Watch:
    """Open what ``config`` asks for on ``stack``; every rank calls it, once the run has resumed."""
    world, progress = parts.world, parts.progress
    events = Events(parts.run.events_jsonl, rank=world.rank, device=world.device, progress=progress)
    saver = TimedSaves(parts.saver, events, world.beat)
    ranks = RankWatch(
        world, parts.engine, parts.batches,
        every_steps=config.log_every_steps, layers=parts.layers if config.layer_norms else None,
    )  # fmt: skip
    places = provenance.collect(world)
    metrics = None
    if places is not None:  # rank 0
        metrics = _metrics(stack, config, parts, events, places, [ranks.fields, saver.fields])
    stack.enter_context(events)  # what escapes is told to the sinks before they close
    events.began(layout=_layout(world))
    report = None if metrics is None else metrics.add
    before: list[Hook] = [ranks]
    after: list[Hook] = [] if metrics is None else [metrics]
    batches: BatchSource = parts.batches
    if config.attention_logits_every_steps is not None:
        logits = AttentionLogits(
            world, parts.engine, every_steps=config.attention_logits_every_steps,
            compiled=parts.compiled, report=report,
        )  # fmt: skip
        before.append(logits)
        batches = logits.watching(batches)
    parts.watchdog.listener = events.heard_of_hang
    return Watch(
        events=events, batches=batches, saver=saver, before=tuple(before), after=tuple(after),
        report=report,
    )  # fmt: skip


def _layout(world: World) -> dict[str, int]:
    """Ranks along each axis, ``auto`` resolved."""
    return dict(zip(AXES, world.axes.shape, strict=True))


def _metrics(
    stack: ExitStack,
    config: MonitorConfig,
    parts: Parts,
    events: Events,
    places: list[tuple[str, str]],
    fields: Sequence[Callable[[], Row]],
) -> Metrics:
    """Open the sinks and make the hook that feeds them, on rank 0."""
    found = provenance.describe(places, parts.plan, _layout(parts.world), events.attempt)
    provenance.append(parts.run.environment_jsonl, found)
    sinks = open_sinks(stack, config, parts.run, parts.progress, parts.plain_config, events, found)

    def more(progress: Progress, result: StepResult) -> Row:
        row: Row = {"attempt": events.attempt}
        row["planned_share"] = parts.plan.planned_shares(progress.step)
        if config.layer_norms and result.gradient_squares is not None:
            squares = result.gradient_squares.tolist()
            row["layer_grad_norm"] = layer_norms(parts.layers, squares)
        for some in fields:
            row.update(some())
        return row

    return Metrics(
        sinks, parts.meter, schedule=parts.schedule, source_names=parts.plan.source_names,
        batches=parts.batches, batch_hash=parts.plan.batch_hash,
        every_steps=config.log_every_steps, more=[more],
    )  # fmt: skip
