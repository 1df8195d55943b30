"""Rounding of exact targets to whole windows, so that counts sum exactly and never fall.

One set of targets is rounded by largest remainders. Targets at several places of a stream, some of
which do not grow from one place to the next, are rounded together: every target to the integer
below or above it, a count once reached is kept, and a source that is off keeps what it has. Such a
rounding is a flow with integers at every node, and one always exists because the targets
themselves are a flow with fractions.

    largest_remainder([Fraction(5, 2), Fraction(1, 2)], 3)   # [3, 0]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from llmtrain.data.indexed import Int64Array

Targets = Sequence[Fraction]
"""The target of each source at one place of the stream."""


def largest_remainder(targets: Targets, total: int | None = None) -> list[int]:
    """Round to integers that sum to ``total``; ties go to the earlier one.

    Null ``total``: the targets sum to an integer, which is kept. Each result is the integer below
    or above its target as long as ``total`` is no further from their sum than that allows.
    """
    counts = [target.numerator // target.denominator for target in targets]
    missing = int(sum(targets, Fraction(0)) if total is None else total) - sum(counts)
    order = sorted(range(len(targets)), key=lambda i: (counts[i] - targets[i], i))
    for i in order[:missing]:
        counts[i] += 1
    return counts


LINE_BITS = 44
"""Bits after the point of targets that are rounded many at a time."""


def largest_remainder_on_lines(offsets: Targets, slopes: Targets, places: Int64Array) -> Int64Array:
    """Round the targets offsets + slopes * x at all ``places`` x < 2**17; [places, sources].

    Slopes sum to 1, the counts at x to x. Targets are taken to 2**-44 for offsets and slopes.
    """
    scale = 1 << LINE_BITS
    slope = np.array(largest_remainder([s * scale for s in slopes]), dtype=np.int64)
    offset = np.array([int(o * scale) for o in offsets], dtype=np.int64)
    targets = offset + slope * places[:, None]
    counts = targets >> LINE_BITS
    remainder = targets & (scale - 1)
    order = np.argsort(-remainder, axis=1, kind="stable")
    rank = np.argsort(order, axis=1, kind="stable")
    missing = places - counts.sum(axis=1)
    rounded: Int64Array = counts + (rank < missing[:, None])
    return rounded


def round_together(targets: Sequence[Targets], between: Sequence[bool]) -> list[list[int]]:
    """Round targets at rising places of the stream to counts that never fall.

    Args:
        targets: per place, of every source; they never fall and sum to an integer.
        between: per place but the last, whether counts between it and the next are rounded by
            largest remainders of the sources that grow; what the others owe together is then kept
            below one window, so that this works out.
    """
    result = list[list[int]]()
    for first, end in _runs(targets):
        if end - first == 1:
            result.append(largest_remainder(targets[first]))
        else:
            result += _round_run(targets[first:end], between[first : end - 1])
    return result


def _runs(targets: Sequence[Targets]) -> Iterator[tuple[int, int]]:
    """Ranges of places that hang together: some source is within the same window at both."""
    first = 0
    for k in range(1, len(targets) + 1):
        if k == len(targets) or not any(
            _same_window(a, b) for a, b in zip(targets[k - 1], targets[k], strict=True)
        ):
            yield first, k
            first = k


def _same_window(here: Fraction, there: Fraction) -> bool:
    """Whether a target is inside the same window, begun and not full, at two places."""
    return here.denominator > 1 and there.denominator > 1 and there // 1 == here // 1


@dataclass
class _Network:
    """A flow: arcs (tail, head) with an amount each, in whole parts at every node."""

    tails: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    amounts: list[Fraction] = field(default_factory=list)

    def add(self, tail: int, head: int, amount: Fraction) -> int:
        """Add an arc; returns its number."""
        self.tails.append(tail)
        self.heads.append(head)
        self.amounts.append(amount)
        return len(self.amounts) - 1


def _round_run(targets: Sequence[Targets], between: Sequence[bool]) -> list[list[int]]:
    """Round the places of one run.

    Time runs along nodes 0, 1, ...: one step for every place and one for every gap with counts
    between. A window that is begun at some places is an arc over their steps, with its begun part
    as amount; an arc back in time for every gap holds what the sources that are off there owe.
    """
    network = _Network()
    node = [0]
    for gap in between:
        node.append(node[-1] + 1 + gap)
    num_nodes = node[-1] + 2
    owed = [Fraction(0)] * len(targets)
    counts = [[target // 1 for target in place] for place in targets]
    arc_of = dict[tuple[int, int], int]()
    for source in range(len(targets[0])):
        line = [place[source] for place in targets]
        for first, end in _windows(line):
            tail = node[first]
            for k in range(first, end):
                grows_next = k + 1 < end and line[k + 1] > line[k]
                if k + 1 < end:
                    owed[k] += line[k] % 1
                if grows_next or k + 1 == end:
                    head = num_nodes if grows_next else node[k] + 1
                    arc = network.add(tail, head, line[k] % 1)
                    for seen in range(k, first - 1, -1):
                        if (seen, source) in arc_of:
                            break
                        arc_of[seen, source] = arc
                    if grows_next:
                        network.add(node[k + 1], head, line[k + 1] - line[k])
                        tail, num_nodes = head, num_nodes + 1
    for k, gap in enumerate(between):
        if gap:
            network.add(node[k] + 2, node[k] + 1, owed[k])
    rounded = round_flow(network.tails, network.heads, network.amounts)
    for (k, source), arc in arc_of.items():
        counts[k][source] += rounded[arc]
    return counts


def _windows(line: Sequence[Fraction]) -> Iterator[tuple[int, int]]:
    """Ranges of places at which a source is inside one and the same begun window."""
    first = 0
    for k in range(1, len(line) + 1):
        if k == len(line) or not _same_window(line[k - 1], line[k]):
            if line[first].denominator > 1:
                yield first, k
            first = k


def round_flow(
    tails: Sequence[int], heads: Sequence[int], amounts: Sequence[Fraction]
) -> list[int]:
    """Round a flow, every arc to the integer below or above, with the same net flow at each node.

    The net flow at each node has to be an integer. Then no node has a single arc with a fraction,
    so such arcs close a cycle; sending the least amount around it that makes one of its arcs whole
    leaves the nodes as they are, and fewer fractions.
    """
    flow = list(amounts)
    open_at = dict[int, dict[int, None]]()
    for arc, amount in enumerate(flow):
        if amount.denominator > 1:
            open_at.setdefault(tails[arc], {})[arc] = None
            open_at.setdefault(heads[arc], {})[arc] = None
    for start in range(len(flow)):
        while flow[start].denominator > 1:
            cycle = _cycle(start, tails, heads, open_at)
            step = min(
                (-flow[arc] if forward else flow[arc]) % 1 for arc, forward in cycle
            )  # to the next integer in its direction
            for arc, forward in cycle:
                flow[arc] += step if forward else -step
                if flow[arc].denominator == 1:
                    del open_at[tails[arc]][arc], open_at[heads[arc]][arc]
    return [int(amount) for amount in flow]


def _cycle(
    start: int, tails: Sequence[int], heads: Sequence[int], open_at: dict[int, dict[int, None]]
) -> list[tuple[int, bool]]:
    """Arcs of a cycle that is found by walking from the arc ``start``, each with its direction."""
    at, arc = heads[start], start
    path = [(start, True)]
    seen = {tails[start]: 0, at: 1}
    while True:
        arc = next(other for other in open_at[at] if other != arc)
        forward = tails[arc] == at
        path.append((arc, forward))
        at = heads[arc] if forward else tails[arc]
        if at in seen:
            return path[seen[at] :]
        seen[at] = len(path)
