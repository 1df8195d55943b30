"""Which source every window of a run comes from: a schedule of shares turned into an exact order.

A phase of the schedule is cut into blocks of 65,536 windows; its last block takes the remainder,
and a shorter phase is one block. What a source has given at the edge of a block is its exact target
rounded to the integer below or above, and inside a block the order is earliest deadline first over
the windows of that block alone. So the cost does not depend on how far the run is, the
counts never fall, a source that is off gives nothing, and after any number of windows every source
is within 2 windows of its target, over any number of phases.

    mixture = Mixture(share_schedule(config.mixture, windows, unit_tokens=2048, num_tokens=10**9))
    sources, ordinals = mixture.assign(0, 512)
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.data.deadlines import earliest_deadline_order, steady_order
from llmtrain.data.indexed import Int64Array
from llmtrain.data.phases import ShareSchedule
from llmtrain.data.rounding import largest_remainder, round_together
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError

SUPER_BLOCK = 65_536
"""Windows in a block that is not the last of its phase."""
KEPT_BLOCKS = 4
"""Blocks kept in memory, about 2 MB each."""


class _Block(NamedTuple):
    """The order of sources between two edges."""

    start: int
    end: int
    sources: npt.NDArray[np.int32]
    ordinals: Int64Array
    by_source: Int64Array
    """Places in the block, source by source, in order."""
    before: list[int]
    """Windows of each source before the block."""
    counts: list[int]
    """Windows of each source in it."""


class Mixture:
    """The order of sources over global windows, for any schedule of shares."""

    def __init__(self, schedule: ShareSchedule) -> None:
        """Follow ``schedule``."""
        self.schedule = schedule
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._rounded = _rounded_edges(schedule)

    @property
    def known_units(self) -> int | None:
        """How much of the stream is decided; None: all of it."""
        return self.schedule.known_units

    def edges(self, window: int) -> tuple[int, int]:
        """Return where the block begins and ends that a global window is in."""
        phase = self.schedule.phase_at(window)
        start, end = self.schedule.phase(phase).start, self.schedule.end(phase)
        number = (window - start) // SUPER_BLOCK
        if end is not None:
            last = max((end - start) // SUPER_BLOCK - 1, 0)
            if number >= last:
                return start + last * SUPER_BLOCK, end
        return start + number * SUPER_BLOCK, start + (number + 1) * SUPER_BLOCK

    def counts(self, edge: int) -> list[int]:
        """Return how many windows each source has given before the edge of a block."""
        if edge in self._rounded:
            return self._rounded[edge]
        targets = self.schedule.integral(edge)
        phase = self.schedule.phase(self.schedule.phase_at(edge))
        off = [not (a or b) for a, b in zip(phase.first, phase.last, strict=True)]
        if edge == phase.start or not any(off):
            return largest_remainder(targets)
        kept = self.counts(phase.start)
        left = edge - sum(count for count, is_off in zip(kept, off, strict=True) if is_off)
        on = [target for target, is_off in zip(targets, off, strict=True) if not is_off]
        rounded = iter(largest_remainder(on, left))
        return [count if is_off else next(rounded) for count, is_off in zip(kept, off, strict=True)]

    def assign(self, start: int, end: int) -> tuple[npt.NDArray[np.int32], Int64Array]:
        """Return, for the global windows [start, end), the source and its running window number.

        Raises:
            IndexError: an adaptive mixture has not decided on all of them yet.
        """
        if self.known_units is not None and end > self.known_units:
            raise IndexError(
                f"windows up to {end} were asked for, the adaptive mixture has decided on "
                f"{self.known_units}; give it the losses of the last interval first"
            )
        sources, ordinals = [np.zeros(0, dtype=np.int32)], [np.zeros(0, dtype=np.int64)]
        while start < end:
            block = self._block(start)
            part = slice(start - block.start, end - block.start)
            sources.append(block.sources[part])
            ordinals.append(block.ordinals[part])
            start = block.end
        return np.concatenate(sources), np.concatenate(ordinals)

    def find(self, source: int, ordinals: Int64Array, end: int) -> Int64Array:
        """Return the global windows at which a source gives its windows ``ordinals``.

        The inverse of ``assign``; ``end`` stands for those not given before global window ``end``.
        """
        end = end if self.known_units is None else min(end, self.known_units)
        windows = np.full(len(ordinals), end, dtype=np.int64)
        order = np.argsort(ordinals, kind="stable")
        rising, done = ordinals[order], 0
        while done < len(order):
            block = self._block_of(source, int(rising[done]), end)
            if block is None:
                break
            before, count = block.before[source], block.counts[source]
            upto = int(np.searchsorted(rising, before + count))
            some = order[done:upto]
            first = sum(block.counts[:source])
            places = block.by_source[first : first + count][rising[done:upto] - before]
            windows[some] = np.minimum(block.start + places, end)
            done = upto
        return windows

    def _block_of(self, source: int, ordinal: int, end: int) -> _Block | None:
        """The block in which a source gives its window ``ordinal``; None: not before ``end``."""
        low, high = 0, self.schedule.phase_at(max(end - 1, 0))
        while low < high:  # the last phase that begins with no more windows given
            middle = (low + high + 1) // 2
            given = self.counts(self.schedule.phase(middle).start)[source]
            low, high = (middle, high) if given <= ordinal else (low, middle - 1)
        start = self.schedule.phase(low).start
        phase_end = self.schedule.end(low)
        stop = end if phase_end is None else min(end, phase_end)
        first, last = 0, max(stop - start - 1, 0) // SUPER_BLOCK
        while first < last:
            middle = (first + last + 1) // 2
            given = self.counts(self.edges(start + middle * SUPER_BLOCK)[0])[source]
            first, last = (middle, last) if given <= ordinal else (first, middle - 1)
        if start + first * SUPER_BLOCK >= end:
            return None
        block = self._block(start + first * SUPER_BLOCK)
        inside = block.before[source] <= ordinal < block.before[source] + block.counts[source]
        return block if inside else None

    def _block(self, window: int) -> _Block:
        start, end = self.edges(window)
        key = self.schedule.version, start
        if key not in self._blocks:
            self._blocks[key] = self._make_block(start, end)
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[key]

    def _make_block(self, start: int, end: int) -> _Block:
        before, after = self.counts(start), self.counts(end)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        bends = self._bends(start, end, counts)
        if bends is None:
            shares = self.schedule.phase(self.schedule.phase_at(start)).first
            targets = zip(self.schedule.integral(start), before, strict=True)
            sources = steady_order(counts, shares, [target - count for target, count in targets])
        else:
            sources = earliest_deadline_order(counts, bends)
        small = np.int16 if len(counts) < 1 << 15 else np.int32
        by_source = np.argsort(sources.astype(small), kind="stable")
        first = np.cumsum(counts) - counts
        ordinals = np.empty(end - start, dtype=np.int64)
        ordinals[by_source] = np.arange(end - start) + np.repeat(np.array(before) - first, counts)
        return _Block(start, end, sources, ordinals, by_source, before, counts)

    def _bends(self, start: int, end: int, counts: Sequence[int]) -> list[Fraction] | None:
        """How curves bend that meet the integers at both edges of a block and never fall.

        A source that gives less than its target grows by slows down in proportion to it; what that
        leaves goes to those that give more, in proportion to how much more.
        """
        bends = self.schedule.bends(self.schedule.phase_at(start))
        if bends is None:
            return None
        targets = zip(self.schedule.integral(start), self.schedule.integral(end), strict=True)
        grown = [after - before for before, after in targets]
        extra = [count - growth for count, growth in zip(counts, grown, strict=True)]
        slower = [e / g if e < 0 else Fraction(0) for e, g in zip(extra, grown, strict=True)]
        moved = sum((bend * s for bend, s in zip(bends, slower, strict=True)), Fraction(0))
        more = sum(e for e in extra if e > 0) or Fraction(1)
        return [
            bend * (1 + s) - (moved * e / more if e > 0 else 0)
            for bend, s, e in zip(bends, slower, extra, strict=True)
        ]


def _rounded_edges(schedule: ShareSchedule) -> dict[int, list[int]]:
    """Edges whose counts hang on those of others: where sources are off or hardly grow.

    Elsewhere every source grows by a window or more between edges, and counts at one edge follow
    from the targets there alone.
    """
    if schedule.known_units is not None:
        return {}  # every source of an adaptive mixture grows in every interval
    places, between = list[int](), list[bool]()
    for number in range(schedule.num_phases):
        start, end = schedule.phase(number).start, schedule.end(number)
        length = (end or start + SUPER_BLOCK) - start
        num_blocks = max(length // SUPER_BLOCK, 1)
        head, tail = _slow_blocks(schedule, number, num_blocks)
        chosen = {*range(head + 1), *range(num_blocks - tail, num_blocks)} & set(range(num_blocks))
        for block, after in zip(sorted(chosen), [*sorted(chosen)[1:], num_blocks], strict=True):
            places.append(start + block * SUPER_BLOCK)
            between.append(after > block + 1 or end is None)
    places.append(places[-1] + SUPER_BLOCK)
    targets = [schedule.integral(place) for place in places]
    return dict(zip(places, round_together(targets, between), strict=True))


def _slow_blocks(schedule: ShareSchedule, number: int, num_blocks: int) -> tuple[int, int]:
    """How many blocks at the beginning and at the end of a phase some source hardly grows in."""
    if not schedule.phase(number).linear or num_blocks == 1:
        return 0, 0
    start = schedule.phase(number).start

    def slow(block: int) -> bool:
        low, high = start + block * SUPER_BLOCK, start + (block + 1) * SUPER_BLOCK
        pairs = zip(schedule.integral(low), schedule.integral(high), strict=True)
        return any(0 < after - before < 1 for before, after in pairs)

    head = 0
    while head < num_blocks and slow(head):
        head += 1
    tail = 0
    while tail < num_blocks - head and slow(num_blocks - 1 - tail):
        tail += 1
    return head, tail


def check_tokenizers(stores: Mapping[str, TokenStore]) -> None:
    """Raise DataError where stores that name their tokenizer name different ones."""
    hashes = {n: s.manifest.tokenizer_hash for n, s in sorted(stores.items()) if s.manifest}
    if len(set(hashes.values())) > 1:
        made = ", ".join(f"{name} with {value[:16]}" for name, value in hashes.items())
        raise DataError(
            f"the stores were made with different tokenizers ({made}); tokenize them with one"
        )
