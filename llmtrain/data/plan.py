"""The batch plan: which windows every optimizer step sees, on any number of ranks.

The stream of a run is a sequence of units, windows of the longest sequence length; the mixture says
which source each comes from, the order of the source says which of its windows that is, and the
step schedule says which units a step takes. So step t of a run is a pure function of (stores,
configuration, t, journal): its state is one integer and the few decisions of the journal. Needs no
torch: `llmtrain trace` and `llmtrain-data mixture` read the same plan.

    plan = plan_of(config, {"wiki": TokenStore.open("stores/wiki")})
    plan.windows(0)                            # of the first step
    plan.steps_of(source=0, window=7, before_step=1000)
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from threading import Lock
from typing import NamedTuple

import blake3
import numpy as np
import numpy.typing as npt

from llmtrain.config.ramp import StepSchedule
from llmtrain.config.run import RunConfig
from llmtrain.data.adaptive import AdaptiveSchedule
from llmtrain.data.fim import FillInMiddle
from llmtrain.data.indexed import Int64Array
from llmtrain.data.journal import SHARE_UNIT, Journal, ShareChange, Skip
from llmtrain.data.mixture import Mixture, check_tokenizers
from llmtrain.data.order import ConcatOrder, SourceOrder
from llmtrain.data.packing import PackedOrder
from llmtrain.data.permutation import derive_key
from llmtrain.data.shares import share_schedule
from llmtrain.data.store import TokenStore

SPAN_UNITS = 512
"""Units that are looked up together."""
KEPT_SPANS = 4
"""Spans kept in memory, 10 kB each."""

_Span = tuple[npt.NDArray[np.int32], Int64Array, Int64Array]
"""Sources, windows and epochs of a run of units."""


class StepWindows(NamedTuple):
    """The units of one global batch, in order; ranks take contiguous parts of them."""

    sources: npt.NDArray[np.int32]
    """Index of the source of each unit (into ``BatchPlan.source_names``)."""
    windows: Int64Array
    """Window of the source (into its order)."""
    epochs: Int64Array
    """How often the source had been read through before, 0-based."""
    sequence_length: int
    """Length of the rows each unit is cut into."""


class Sighting(NamedTuple):
    """One time a window was in a batch."""

    step: int
    """0-based step."""
    unit: int
    """Which unit of the global batch it was."""
    epoch: int
    """Epoch of its source, 0-based."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePlan:
    """What one source gives to a run."""

    name: str
    """Name of the source."""
    share: float
    """Its share of the run's units."""
    num_tokens: int
    """Tokens in its store."""
    num_windows: int
    """Units of an epoch."""
    planned_tokens: int
    """Tokens it gives to the run, padding of packed rows counted."""
    epochs: float
    """How often the run reads it."""


class BatchPlan:
    """The order of windows over a whole run; cheap to make and to ask at any step."""

    def __init__(
        self,
        orders: Mapping[str, SourceOrder],
        mixture: Mixture,
        steps: StepSchedule,
        *,
        seed: int,
        fim: FillInMiddle | None = None,
        journal: Journal | None = None,
    ) -> None:
        """Mix the sources of ``orders``, in the order of their names, as ``mixture`` says.

        Raises:
            DataError: the stores are of different tokenizers.
        """
        check_tokenizers({name: order.store for name, order in orders.items()})
        self.source_names = tuple(sorted(orders))
        self.orders = tuple(orders[name] for name in self.source_names)
        self.mixture = mixture
        self.steps = steps
        self.seed = seed
        self.fim = fim
        self.journal = journal or Journal()
        self._spans: OrderedDict[int, _Span] = OrderedDict()
        self._lock = Lock()  # the reader ahead and the loop ask at the same time

    @property
    def fingerprint(self) -> str:
        """blake3 hex of everything but the journal that the order of tokens depends on."""
        parts: list[str | int] = [self.seed, self.steps.unit_tokens]
        parts += [str(self.steps.shapes()), self.mixture.schedule.fingerprint]
        parts += ["" if self.fim is None else str(self.fim.config)]
        for name, order in zip(self.source_names, self.orders, strict=True):
            parts += [name, order.store.fingerprint, order.kind]
        return str(blake3.blake3(derive_key("batch plan", *parts)).hexdigest())

    def windows(self, step: int) -> StepWindows:
        """Return the units of the global batch of 0-based step ``step``.

        Raises:
            IndexError: an adaptive mixture has not decided on them yet (see ``knows``).
        """
        first, num_units = self._units(step)
        numbers = range(first // SPAN_UNITS, -(-(first + num_units) // SPAN_UNITS))
        with self._lock:
            spans = [self._span(number) for number in numbers]
        parts = [
            np.concatenate(part) if len(spans) > 1 else part[0] for part in zip(*spans, strict=True)
        ]
        low = first - numbers.start * SPAN_UNITS
        sources, windows, epochs = (part[low : low + num_units] for part in parts)
        if len(sources) < num_units:
            raise IndexError(f"units {first} to {first + num_units} are not decided yet")
        return StepWindows(sources, windows, epochs, self.steps.shape(step).sequence_length)

    def _span(self, number: int) -> _Span:
        """Return what is known of SPAN_UNITS units: asked for together, a unit costs a tenth."""
        if number in self._spans:
            return self._spans[number]
        start, end = number * SPAN_UNITS, (number + 1) * SPAN_UNITS
        known = self.mixture.known_units
        sources, ordinals = self.mixture.assign(start, min(end, known or end))
        windows, epochs = np.empty_like(ordinals), np.empty_like(ordinals)
        for source in np.unique(sources).tolist():
            order = self.orders[source]
            rows = np.flatnonzero(sources == source)
            epoch_of, position = np.divmod(ordinals[rows], order.num_windows)
            epochs[rows] = epoch_of
            for epoch in np.unique(epoch_of).tolist():
                chosen = epoch_of == epoch
                windows[rows[chosen]] = order.windows(epoch, position[chosen])
        if len(sources) == SPAN_UNITS:
            self._spans[number] = sources, windows, epochs
            while len(self._spans) > KEPT_SPANS:
                self._spans.popitem(last=False)
        return sources, windows, epochs

    def adopt(self, journal: Journal) -> None:
        """Go by another journal: that of the checkpoint a run resumes from.

        Raises:
            DataError: its decisions are not those of this mixture.
        """
        with self._lock:
            self.mixture.schedule.follow(journal.shares)
            self.journal = journal
            self._spans.clear()

    def decide(self, losses: Sequence[tuple[float, float]]) -> ShareChange:
        """Let an adaptive mixture decide on its next interval, and note it in the journal."""
        schedule = self.mixture.schedule
        if not isinstance(schedule, AdaptiveSchedule):
            raise TypeError(f"the mixture is fixed: {schedule.fingerprint}")
        with self._lock:
            change = schedule.decide(losses)
            self.journal = replace(self.journal, shares=(*self.journal.shares, change))
        return change

    def named_shares(self, change: ShareChange) -> str:
        """Return the shares of a decision for people: ``code 0.25, wiki 0.75``."""
        parts = zip(self.source_names, change.shares, strict=True)
        return ", ".join(f"{name} {part / SHARE_UNIT:.4f}" for name, part in parts)

    def planned_shares(self, steps: int) -> dict[str, float]:
        """Return the share of each source that is planned for the first ``steps`` steps."""
        units = sum(self._units(steps - 1)) if steps else 0
        if not units:
            return {}
        targets = self.mixture.schedule.integral(units)
        pairs = zip(self.source_names, targets, strict=True)
        return {name: float(target / units) for name, target in pairs}

    def batch_hash(self, step: int) -> str:
        """Return 16 hex digits of blake3 over the units of a batch: the same batch, the same hash.

        Equal on any number of ranks; with equal fingerprints of the plans, equal tokens.
        """
        chosen = self.windows(step)
        digest = blake3.blake3(chosen.sequence_length.to_bytes(8, "little"))
        for part in chosen[:3]:
            digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
        return str(digest.hexdigest(length=8))

    def leave_out(self, step: int, last: int) -> Skip:
        """Return what leaves out all units from those of 0-based ``step`` to the end of ``last``.

        It takes the place of what the guard left out from ``step`` on.
        """
        end, start = sum(self._units(last)), self.steps.shape(step).first_unit
        before = sum(
            skip.num_units
            for skip in self.journal.skips
            if skip.step < step or (skip.step == step and not skip.by_guard)
        )
        return Skip(step, end - start - before, by_guard=True)

    def first_unit(self, step: int) -> int:
        """Return the first unit of the stream that 0-based step ``step`` takes."""
        return self._units(step)[0]

    def knows(self, step: int) -> bool:
        """Whether the batch of 0-based step ``step`` is decided."""
        known = self.mixture.known_units
        return known is None or sum(self._units(step)) <= known

    def step_of(self, unit: int) -> int | None:
        """Return the 0-based step that takes a unit of the stream; None where it was left out."""
        edges = [0, *(skip.step for skip in self.journal.skips), None]
        for first, after in pairwise(edges):
            own = unit - self.journal.units_skipped(first or 0)
            if own < self.steps.shape(first or 0).first_unit:
                return None
            if after is None or own < self.steps.shape(after).first_unit:
                return self.steps.step_of(own)
        return None

    def steps_of(self, source: int, window: int, before_step: int) -> list[Sighting]:
        """Return when the first ``before_step`` steps see a window of a source, in order."""
        order, sightings = self.orders[source], list[Sighting]()
        end = sum(self._units(before_step - 1)) if before_step > 0 else 0
        end = min(end, self.mixture.known_units or end)
        for epoch in count():
            ordinal = order.positions(epoch, np.array([window])) + epoch * order.num_windows
            unit = int(self.mixture.find(source, ordinal, end)[0])
            if unit >= end:
                return sightings
            step = self.step_of(unit)
            if step is not None:
                sightings.append(Sighting(step, unit - self._units(step)[0], epoch))
        return sightings

    def describe(self, num_tokens: int) -> tuple[SourcePlan, ...]:
        """Return what each source gives to a run of ``num_tokens`` training tokens."""
        num_units = -(-num_tokens // self.steps.unit_tokens)
        targets = self.mixture.schedule.integral(num_units)
        return tuple(
            SourcePlan(
                name=name,
                share=float(target / num_units),
                num_tokens=order.store.num_tokens,
                num_windows=order.num_windows,
                planned_tokens=int(target * self.steps.unit_tokens),
                epochs=float(target / order.num_windows),
            )
            for name, order, target in zip(self.source_names, self.orders, targets, strict=True)
        )

    def _units(self, step: int) -> tuple[int, int]:
        """First unit of the stream that a step takes, and their number."""
        shape = self.steps.shape(step)
        return shape.first_unit + self.journal.units_skipped(step), shape.num_units


ORDERS: Mapping[str, Callable[..., SourceOrder]] = {"concat": ConcatOrder, "best_fit": PackedOrder}
"""What a window is made of, by ``data.packing``."""


def plan_of(
    config: RunConfig, stores: Mapping[str, TokenStore], journal: Journal | None = None
) -> BatchPlan:
    """Make the plan of a run; null ``journal``: what the configuration itself leaves out.

    Raises:
        DataError: a store holds less than one window, or is not packed for this length.
        ConfigError: the mixture does not fit the sources.
    """
    training, steps = config.training, config.training.steps
    make, length = ORDERS[config.data.packing], training.sequence_length
    orders = {
        name: make(store, name, seed=training.seed, window_tokens=length)
        for name, store in sorted(stores.items())
    }
    journal = journal or Journal(skips=configured_skips(config))
    schedule = share_schedule(
        config.mixture,
        {name: order.num_windows for name, order in orders.items()},
        unit_tokens=training.sequence_length,
        num_tokens=training.num_tokens,
        journal=journal.shares,
    )
    fim = None
    if config.data.fim is not None:
        fim = FillInMiddle(config.data.fim, seed=training.seed, source_names=tuple(orders))
    return BatchPlan(orders, Mixture(schedule), steps, seed=training.seed, fim=fim, journal=journal)


def configured_skips(config: RunConfig) -> tuple[Skip, ...]:
    """Return the windows that data.skip_steps leaves out: those of whole steps, 1-based."""
    steps = config.training.steps
    return tuple(
        Skip(first - 1, steps.shape(last).first_unit - steps.shape(first - 1).first_unit)
        for first, last in config.data.skip_steps
    )
