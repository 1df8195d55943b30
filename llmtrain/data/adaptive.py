"""Shares of the sources from their losses: the Exp3 bandit, one decision every interval of windows.

Exp3 (Auer, Cesa-Bianchi, Freund, Schapire: The nonstochastic multiarmed bandit problem, 2002) as it
mixes data in arXiv:2312.02406: sources are arms, a high loss is a high reward. A window is a draw;
the mean over an interval of Exp3's estimate, the loss of a window over the share of its source, is
the mean loss of the source, for a source gives its share of the windows. So after each interval

    log weight += learning_rate * min(mean loss, loss_scale) / loss_scale
    share = (1 - exploration) * weight / sum of weights + exploration / number of sources

Interval k is the windows [k n, (k + 1) n). Intervals 0 and 1 have the first shares; those of
interval k >= 2 are decided from the losses of interval k - 2 when its last step is done, while
interval k - 1 is trained on. So nothing that reads ahead by less than an interval ever waits.
Decisions are whole numbers with the state they were made from, so a journal of them tells the rest.

    change = schedule.decide(losses)     # [(loss sum, targets) of each source]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

from llmtrain.data.journal import SHARE_UNIT, ShareChange
from llmtrain.data.phases import ShareSchedule, constant
from llmtrain.data.rounding import largest_remainder
from llmtrain.errors import DataError

EXACT = Context(prec=30)
"""Exponentials and logarithms are rounded correctly in it, whatever the platform."""
DIGITS = 12
"""Digits kept after the point of a weight and of a logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exp3:
    """The rule; a pure function of its fields and arguments."""

    interval: int
    """Windows between two decisions."""
    learning_rate: float
    """Factor of the rewards."""
    exploration: float
    """Part that is shared out equally."""
    loss_scale: float
    """Mean loss whose reward is 1."""
    num_units: int | None = None
    """Windows of the run, where there is a limit: what a source may still give is spread over those
    that are left."""
    most: tuple[Fraction, ...] = ()
    """Windows each source may give to the run in all; none: no limit."""

    @property
    def least(self) -> int:
        """Smallest share that gives a window in every interval."""
        return -(-SHARE_UNIT // self.interval)

    def first(self, shares: Sequence[Fraction]) -> ShareChange:
        """Return what a run begins with; its weights are ``shares``, all above 0."""
        state = tuple(_rounded(EXACT.ln(_decimal(share))) for share in shares)
        return ShareChange(0, self._shares(state, 0, [Fraction(0)] * len(state)), state)

    def next(
        self,
        before: ShareChange,
        losses: Sequence[tuple[float, float]],
        first_unit: int,
        given: Sequence[Fraction],
    ) -> ShareChange:
        """Return the shares from window ``first_unit`` on.

        Args:
            before: the last decision.
            losses: loss sum and number of targets of each source over one interval; a source
                without targets, or whose loss is not finite, keeps its weight.
            first_unit: window at which the shares decided so far end.
            given: windows each source will have given by then.
        """
        moved = [
            weight + self.learning_rate * self._reward(*loss)
            for weight, loss in zip(before.state, losses, strict=True)
        ]
        state = tuple(round(weight - max(moved), DIGITS) for weight in moved)
        return ShareChange(first_unit, self._shares(state, first_unit, given), state)

    def _reward(self, loss: float, targets: float) -> float:
        if targets <= 0 or not math.isfinite(loss):
            return 0.0
        return min(max(loss / targets, 0.0), self.loss_scale) / self.loss_scale

    def _shares(
        self, state: Sequence[float], first_unit: int, given: Sequence[Fraction]
    ) -> tuple[int, ...]:
        weights = [Fraction(_digits(EXACT.exp(Decimal(repr(weight))))) for weight in state]
        total, explored = sum(weights), Fraction(repr(self.exploration))
        parts = [
            SHARE_UNIT * ((1 - explored) * weight / total + explored / len(weights))
            for weight in weights
        ]
        left = 0 if self.num_units is None else self.num_units - first_unit
        if left <= 0:
            return tuple(largest_remainder(parts))
        room = [(most - done) / left for most, done in zip(self.most, given, strict=True)]
        limits = [max(self.least, math.floor(SHARE_UNIT * part)) for part in room]
        return tuple(_held_below(largest_remainder(parts), limits))


def _held_below(parts: list[int], limits: Sequence[int]) -> list[int]:
    """Take what is above a limit and share it out among the others in proportion to their parts.

    Where the limits leave no room for all of it, the first source takes the rest.
    """
    total = sum(parts)
    while True:
        parts = [min(part, limit) for part, limit in zip(parts, limits, strict=True)]
        over = total - sum(parts)
        free = [
            i for i, (part, limit) in enumerate(zip(parts, limits, strict=True)) if part < limit
        ]
        if not over or not free:
            parts[0] += over
            return parts
        weight = sum(parts[i] for i in free)
        extra = largest_remainder([Fraction(over * parts[i], weight) for i in free])
        for i, more in zip(free, extra, strict=True):
            parts[i] += more


class AdaptiveSchedule(ShareSchedule):
    """Shares that are known up to two intervals ahead of the losses."""

    def __init__(
        self, rule: Exp3, shares: Sequence[Fraction], decided: Sequence[ShareChange] = ()
    ) -> None:
        """Begin with ``shares`` and go on with what was ``decided``.

        Raises:
            DataError: the decisions are not those of such a mixture.
        """
        self.rule = rule
        self._first = rule.first(shares)
        self._decided = list[ShareChange]()
        self._version = 0
        parts = _shares_of(self._first)
        super().__init__([constant(0, parts), constant(rule.interval, parts)], rule.num_units)
        self.follow(decided)

    @property
    def known_units(self) -> int:
        """End of the last interval that has shares."""
        return self.num_phases * self.rule.interval

    @property
    def version(self) -> int:
        """Number of times other decisions took the place of earlier ones."""
        return self._version

    @property
    def decides_after(self) -> int:
        """End of the interval whose losses the next decision is made from."""
        return self.known_units - self.rule.interval

    def decide(self, losses: Sequence[tuple[float, float]]) -> ShareChange:
        """Add the shares of one more interval, from (loss sum, targets) of each source.

        To be called when the steps that begin before window ``decides_after`` are done, with the
        losses of those that no earlier decision was made from.
        """
        first = self.known_units
        before = self._decided[-1] if self._decided else self._first
        change = self.rule.next(before, losses, first, self.integral(first))
        self._take(change)
        return change

    def follow(self, decided: Sequence[ShareChange]) -> None:
        """Go by other decisions: those of the checkpoint a run goes back to.

        Raises:
            DataError: they are not those of such a mixture.
        """
        same = 0
        while same < min(len(decided), len(self._decided)) and (
            decided[same] == self._decided[same]
        ):
            same += 1
        if same < len(self._decided):
            self._version += 1
            del self._decided[same:]
            self._clear(2 + same)
        for change in decided[same:]:
            self._take(change)

    def _text(self) -> str:
        """The rule and what it begins with, without what it decided."""
        return f"adaptive from {self._first.shares} by {self.rule}"

    def _take(self, change: ShareChange) -> None:
        sums = (change.first_unit, len(change.shares), len(change.state), sum(change.shares))
        wanted = (self.known_units, self.num_sources, self.num_sources, SHARE_UNIT)
        if sums != wanted or min(change.shares) < self.rule.least:
            raise DataError(
                f"the journal holds shares of {sums[1]} sources from window {sums[0]} on with the "
                f"sum {sums[3]}, expected {wanted[1]} sources from window {wanted[0]} on with the "
                f"sum {wanted[3]}; it belongs to another run: resume from its own checkpoint"
            )
        self._decided.append(change)
        self._add(constant(change.first_unit, _shares_of(change)))


def _shares_of(change: ShareChange) -> tuple[Fraction, ...]:
    return tuple(Fraction(part, SHARE_UNIT) for part in change.shares)


def _decimal(value: Fraction) -> Decimal:
    return EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))


def _digits(value: Decimal) -> Decimal:
    return round(value, DIGITS)


def _rounded(value: Decimal) -> float:
    return float(_digits(value))
