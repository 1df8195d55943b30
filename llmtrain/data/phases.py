"""A schedule of shares: how many windows each source should have given, exactly, in closed form.

A phase begins at a global window and has a share for every source at its beginning and at its end;
in between the shares lie on a straight line, so their integral is a polynomial of degree two with
rational coefficients. The last phase has no end and constant shares.

    half = Fraction(1, 2)
    schedule = ShareSchedule([Phase(0, (half, half), (half, half))])
    schedule.integral(3)     # [Fraction(3, 2), Fraction(3, 2)]
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import blake3

from llmtrain.data.journal import ShareChange

Shares = tuple[Fraction, ...]
"""Share of each source; they sum to 1."""

READABLE = 500
"""A longer text of a schedule is replaced by its hash."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the stream with shares on a straight line."""

    start: int
    """Its first global window."""
    first: Shares
    """Shares at its beginning."""
    last: Shares
    """Shares at its end; the same where they are constant."""

    @property
    def linear(self) -> bool:
        """Whether the shares move."""
        return self.first != self.last

    def __str__(self) -> str:
        shares = " ".join(str(share) for share in self.first)
        return f"{self.start}: {shares}" + (" to the next" if self.linear else "")


def constant(start: int, shares: Shares) -> Phase:
    """Return a phase from window ``start`` on in which ``shares`` hold."""
    return Phase(start, shares, shares)


class ShareSchedule:
    """The target of every source after any number of windows."""

    def __init__(self, phases: Sequence[Phase], planned_for: int | None = None) -> None:
        """Follow ``phases`` in order: the first starts at 0, the last has constant shares.

        ``planned_for`` are the windows of the run, where the phases are made for its length.
        """
        self._planned_for = planned_for
        self._starts = list[int]()
        self._phases = list[Phase]()
        self._before = list[list[Fraction]]()
        for phase in phases:
            self._add(phase)
        self.num_sources = len(phases[0].first)

    @property
    def known_units(self) -> int | None:
        """How much of the stream is decided; None: all of it."""
        return None

    @property
    def version(self) -> int:
        """Changes whenever something already decided becomes something else."""
        return 0

    @property
    def fingerprint(self) -> str:
        """What the order of sources depends on, readable where it is short."""
        text = self._text()
        if len(text) > READABLE:
            text = blake3.blake3(text.encode()).hexdigest()
        if self._planned_for is None:
            return text
        return f"planned for the {self._planned_for:,} windows of training.num_tokens, {text}"

    @property
    def num_phases(self) -> int:
        """Number of phases."""
        return len(self._starts)

    def phase(self, number: int) -> Phase:
        """Return a phase, from 0 on."""
        return self._phases[number]

    def phase_at(self, window: int) -> int:
        """Return the number of the phase a global window is in."""
        return bisect_right(self._starts, window) - 1

    def end(self, number: int) -> int | None:
        """Return the window after a phase; None for the last of a stream without end."""
        return self._starts[number + 1] if number + 1 < len(self._starts) else self.known_units

    def bends(self, number: int) -> Shares | None:
        """Return how fast the shares of a phase move, per two windows; None where they do not."""
        phase, end = self._phases[number], self.end(number)
        if not phase.linear or end is None:
            return None
        length = 2 * (end - phase.start)
        return tuple((b - a) / length for a, b in zip(phase.first, phase.last, strict=True))

    def integral(self, num_windows: int) -> list[Fraction]:
        """Return the target of each source after ``num_windows``; they sum to it and never fall."""
        number = self.phase_at(num_windows)
        x = num_windows - self._starts[number]
        shares, bends = self._phases[number].first, self.bends(number)
        if bends is None:
            return [b + s * x for b, s in zip(self._before[number], shares, strict=True)]
        terms = zip(self._before[number], shares, bends, strict=True)
        return [before + share * x + bend * x * x for before, share, bend in terms]

    def follow(self, decided: Sequence[ShareChange]) -> None:
        """Go by the decisions of a journal; a schedule that decides nothing has none to follow."""

    def _text(self) -> str:
        return "; ".join(str(phase) for phase in self._phases)

    def _add(self, phase: Phase) -> None:
        """Append a phase; whoever reads at the same time sees all of it or nothing."""
        previous = len(self._starts)
        if previous:
            x = phase.start - self._starts[-1]
            means = zip(
                self._before[-1], self._phases[-1].first, self._phases[-1].last, strict=True
            )
            before = [b + (first + last) / 2 * x for b, first, last in means]
        else:
            before = [Fraction(0)] * len(phase.first)
        self._before.append(before)
        self._phases.append(phase)
        self._starts.append(phase.start)

    def _clear(self, num_phases: int) -> None:
        """Leave out the phases from ``num_phases`` on."""
        for part in (self._starts, self._phases, self._before):
            del part[num_phases:]
