"""Which source every window of a run comes from: token shares turned into an exact order.

Global windows fall into super-blocks of 65,536. The number of windows a source has given at the
edge of a super-block is the largest-remainder rounding of the exact integral of its share, in
rational numbers; inside a super-block the order is earliest deadline first over the counts of that
block alone. So the cost does not depend on how far the run is, the counts never fall, and after any
number of windows a source is within 2 windows of its share of them.

    mixture = Mixture(ConstantShares(shares_of({"wiki": 0.7, "code": 0.3})))
    sources, ordinals = mixture.assign(0, 512)
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.data.indexed import Int64Array
from llmtrain.data.store import TokenStore
from llmtrain.errors import ConfigError, DataError

SUPER_BLOCK = 65_536
"""Windows in a super-block."""
MIN_SHARE = Fraction(1, SUPER_BLOCK)
"""Smallest share; below it the rounded counts of a source could fall from one edge to the next."""
KEPT_BLOCKS = 4
"""Super-blocks kept in memory, about 0.8 MB each."""


class ShareSchedule(Protocol):
    """How many windows each source should have given after a number of windows in all."""

    @property
    def num_sources(self) -> int:
        """Number of sources."""
        ...

    def integral(self, num_windows: int) -> Sequence[Fraction]:
        """Return the exact target of each source after ``num_windows``; they sum to it.

        Between two edges of super-blocks every source's target grows by at least one window.
        """
        ...


@dataclass(frozen=True, slots=True)
class ConstantShares:
    """The same shares from the first window to the last."""

    shares: tuple[Fraction, ...]
    """Share of each source; they sum to 1."""

    @property
    def num_sources(self) -> int:
        """Number of sources."""
        return len(self.shares)

    def integral(self, num_windows: int) -> Sequence[Fraction]:
        """Return share times windows."""
        return [share * num_windows for share in self.shares]


def shares_of(weights: Mapping[str, float | int | Fraction]) -> tuple[Fraction, ...]:
    """Turn weights into shares that sum to exactly 1, in the order of ``weights``.

    A float counts as the decimal it prints as: 0.1 is 1/10. A weight of 0 turns a source off.

    Raises:
        ConfigError: a weight is negative, not finite or under 1/65,536 of the sum, or all are 0.
    """
    problems = [
        f"mixture.weights.{name}={weight} is no share; use a number of 0 or more"
        for name, weight in weights.items()
        if not 0 <= weight < float("inf")
    ]
    if problems:
        raise ConfigError(problems)
    exact = [w if isinstance(w, Fraction) else Fraction(repr(w)) for w in weights.values()]
    total = sum(exact, Fraction(0))
    if total == 0:
        raise ConfigError("mixture.weights are all 0; give at least one source a positive weight")
    shares = tuple(weight / total for weight in exact)
    small = [
        f"mixture.weights.{name} is {float(share):.3g} of the sum, the smallest share is 1/"
        f"{SUPER_BLOCK:,}; raise it, leave the source out, or merge it with another"
        for name, share in zip(weights, shares, strict=True)
        if 0 < share < MIN_SHARE
    ]
    if small:
        raise ConfigError(small)
    return shares


def num_windows(store: TokenStore, sequence_length: int) -> int:
    """Windows of ``sequence_length`` inputs, and the last one's target, in one epoch of a store."""
    return (store.num_tokens - 1) // sequence_length


def source_shares(
    stores: Mapping[str, TokenStore], weights: Mapping[str, float] | None, sequence_length: int
) -> tuple[Fraction, ...]:
    """Return the shares of ``stores`` in order of their names; null weights: by their windows.

    Raises:
        DataError: a store holds less than one window, or stores are of different tokenizers.
        ConfigError: weights and stores do not name the same sources, or a weight is no share.
    """
    _check_sources(stores, weights, sequence_length)
    given = weights or {n: num_windows(store, sequence_length) for n, store in stores.items()}
    return shares_of({name: given[name] for name in sorted(stores)})


def _check_sources(
    stores: Mapping[str, TokenStore], weights: Mapping[str, float] | None, sequence_length: int
) -> None:
    if not stores:
        raise ConfigError("data.sources is empty; set data.sources.NAME=stores/NAME")
    if weights is not None and set(weights) != set(stores):
        raise ConfigError(
            f"mixture.weights names {sorted(weights)}, data.sources names {sorted(stores)}; give "
            "every source a weight and no other name"
        )
    for name, store in stores.items():
        if store.num_tokens < sequence_length + 1:
            raise DataError(
                f"source {name} holds {store.num_tokens:,} tokens, a window needs "
                f"{sequence_length + 1:,}; lower training.sequence_length or leave the source out"
            )
    check_tokenizers(stores)


def check_tokenizers(stores: Mapping[str, TokenStore]) -> None:
    """Raise DataError where stores that name their tokenizer name different ones."""
    hashes = {n: s.manifest.tokenizer_hash for n, s in sorted(stores.items()) if s.manifest}
    if len(set(hashes.values())) > 1:
        made = ", ".join(f"{name} with {value[:16]}" for name, value in hashes.items())
        raise DataError(
            f"the stores were made with different tokenizers ({made}); tokenize them with one"
        )


def largest_remainder(targets: Sequence[Fraction]) -> list[int]:
    """Round numbers with an integer sum to integers of that sum; ties go to the earlier one."""
    counts = [target.numerator // target.denominator for target in targets]
    missing = int(sum(targets, Fraction(0))) - sum(counts)
    order = sorted(range(len(targets)), key=lambda i: (counts[i] - targets[i], i))
    for i in order[:missing]:
        counts[i] += 1
    return counts


class Mixture:
    """The order of sources over global windows, for any schedule of shares."""

    def __init__(self, schedule: ShareSchedule) -> None:
        """Follow ``schedule``."""
        self.schedule = schedule
        self._blocks: OrderedDict[int, tuple[npt.NDArray[np.int32], Int64Array]] = OrderedDict()

    def counts(self, block: int) -> list[int]:
        """Return how many windows each source has given before super-block ``block``."""
        return largest_remainder(self.schedule.integral(block * SUPER_BLOCK))

    def assign(self, start: int, end: int) -> tuple[npt.NDArray[np.int32], Int64Array]:
        """Return, for the global windows [start, end), the source and its running window number."""
        sources, ordinals = [], []
        for number in range(start // SUPER_BLOCK, -(-end // SUPER_BLOCK)):
            low = max(start - number * SUPER_BLOCK, 0)
            high = min(end - number * SUPER_BLOCK, SUPER_BLOCK)
            block_sources, block_ordinals = self._block(number)
            sources.append(block_sources[low:high])
            ordinals.append(block_ordinals[low:high])
        if not sources:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64)
        return np.concatenate(sources), np.concatenate(ordinals)

    def _block(self, number: int) -> tuple[npt.NDArray[np.int32], Int64Array]:
        if number not in self._blocks:
            before, after = self.counts(number), self.counts(number + 1)
            counts = np.array(after) - np.array(before)
            sources = earliest_deadline_order(counts)
            by_source = np.argsort(sources, kind="stable")
            ordinals = np.empty(SUPER_BLOCK, dtype=np.int64)
            first = np.cumsum(counts) - counts
            ordinals[by_source] = np.arange(SUPER_BLOCK) + np.repeat(before - first, counts)
            self._blocks[number] = sources, ordinals
            while len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]


def earliest_deadline_order(counts: Int64Array) -> npt.NDArray[np.int32]:
    """Order ``counts[i]`` windows of each source i so that all advance evenly.

    Window j of a source with count c of the sum w may come from slot floor(j w / c) on and has to
    come before slot ceil((j + 1) w / c). Unit jobs of total density 1 always meet such deadlines
    when the earliest one goes first, so after t slots each source has given more than c t / w - 1
    and less than c t / w + 1 windows. Ties go to the earlier source.
    """
    total, num_sources = int(counts.sum()), len(counts)
    source = np.repeat(np.arange(num_sources), counts)
    j = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    c = np.repeat(counts, counts)
    release = j * total // c
    key = -(-(j + 1) * total // c) * num_sources + source
    by_release = np.argsort(release, kind="stable")
    releases, keys = release[by_release].tolist(), key[by_release].tolist()
    ready: list[int] = []
    order = np.empty(total, dtype=np.int32)
    arrived = 0
    for slot in range(total):
        while arrived < total and releases[arrived] <= slot:
            heappush(ready, keys[arrived])
            arrived += 1
        order[slot] = heappop(ready) % num_sources
    return order
