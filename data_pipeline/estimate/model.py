"""From nested samples to the whole: what scales with the input, and what does not.

Rules for single documents keep the same share of any sample, so that their share in the sample is
that of the whole, up to the error of sampling. Deduplication is different. The expected share it
removes grows with the share p of the corpus that it sees, and its growth slows down: a page of a
cluster of c is removed from the sample with probability 1 - (1 - (1-p)^c) / (c p), which is
increasing and concave in p. The share seen in the sample is therefore a lower bound, the straight
line through the two largest samples an upper one, and the power law through the smallest and the
largest lies between. Time is a fixed part and one that grows with the text.

    grown = grow([Seen(0.0025, 900, 10), Seen(0.005, 1800, 35), Seen(0.01, 3600, 130)])
    grown.low, grown.mid, grown.high    # shares removed from the whole
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.estimate.draw import NESTED, Draw
from data_pipeline.estimate.trial import Trial
from data_pipeline.report.record import AFTER_STAGES

_DEVIATIONS = 2.0
"""Standard deviations on each side of an interval, about 95 %."""


class Range(NamedTuple):
    """A number with the interval it is expected in."""

    low: float
    """Lower end."""
    mid: float
    """Best guess."""
    high: float
    """Upper end."""

    def times(self, other: "Range") -> "Range":
        """Product with another range of numbers that are not negative."""
        return Range(self.low * other.low, self.mid * other.mid, self.high * other.high)

    def scaled(self, factor: float) -> "Range":
        """Product with a number that is not negative."""
        return Range(self.low * factor, self.mid * factor, self.high * factor)


class Seen(NamedTuple):
    """What a stage that compares documents removed from one sample."""

    share: float
    """Share of the whole that the sample is, in (0, 1]."""
    total: float
    """Documents or bytes it read."""
    removed: float
    """Documents or bytes it removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEstimate:
    """One row of the estimated funnel."""

    name: str
    """Name of the step or stage."""
    compares: bool
    """Whether its share grows with the corpus."""
    documents_in: Range
    """Documents it will judge."""
    documents_out: Range
    """Documents that will go on."""
    bytes_out: Range
    """UTF-8 bytes that will go on."""
    sample_share: float
    """Share of the documents it kept in the largest sample."""
    dropped: dict[str, float]
    """Documents dropped, by reason, in the middle of the interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a pipeline is expected to do with the whole input."""

    share: float
    """Share of the records in the largest sample."""
    records: Range
    """Records of the whole."""
    steps: tuple[StepEstimate, ...]
    """The funnel."""
    seconds: dict[str, Range]
    """Wall time by stage, with the workers of the trial."""
    disk_bytes: Range
    """Bytes the finished folder takes."""
    tokens: Range
    """Tokens of all stores."""
    vocab_size: int
    """Pieces of the vocabulary that counted tokens in the sample."""


def grow(seen: Sequence[Seen]) -> Range:
    """Return the share that deduplication removes from the whole, from three nested samples."""
    first, middle, last = seen
    shares = [one.removed / one.total if one.total else 0.0 for one in seen]
    if last.share >= 1.0:
        return Range(shares[2], shares[2], shares[2])
    left, step = 1.0 - last.share, last.share - middle.share
    errors = [_error(share, one.total) for share, one in zip(shares, seen, strict=True)]
    low = max(0.0, shares[2] - errors[2])
    line = shares[2] + left * max(0.0, shares[2] - shares[1]) / step
    noise = left * math.sqrt(0.5) * (errors[1] + errors[2]) / step  # half of the sample is shared
    high = min(1.0, line + errors[2] + noise, (shares[2] + errors[2]) / last.share)
    mid = shares[2]
    if shares[0] > 0:
        power = math.log(shares[2] / shares[0]) / math.log(last.share / first.share)
        mid = shares[2] * (1 / last.share) ** min(1.0, max(0.0, power))
    elif shares[2] > 0:
        mid = line
    return Range(min(low, high), min(max(mid, low), line, high), high)


def _error(share: float, total: float) -> float:
    """Half width of the interval of a share of ``total`` things, wide enough for small counts."""
    if total <= 0:
        return 1.0
    seen = min(0.5, share + 1.0 / total)
    return _DEVIATIONS * math.sqrt(seen * (1 - seen) / total) + 1.0 / total


def extrapolate(draw: Draw, trials: Sequence[Trial]) -> Estimate:
    """Return the estimate for the whole from trials over nested samples, smallest first."""
    largest = trials[-1]
    records = Range(draw.records, draw.records, draw.records)
    spread = {s.name: _file_error(draw, s.kept_by_file) for s in largest.stages}
    steps: list[StepEstimate] = []
    documents, text = records, Range(0.0, 0.0, 0.0)
    whole = float(draw.total_bytes)
    reading = {largest.steps[0].stage: Range(whole, whole, whole)}
    for i, step in enumerate(largest.steps):
        kept = _kept(draw, trials, i, "documents")
        out = documents.times(kept)
        if i == 0:
            text = out.scaled(step.bytes_out / max(1, step.documents_out))
        else:
            reading.setdefault(step.stage, text)
            text = text.times(_kept(draw, trials, i, "bytes"))
        gone = max(1, sum(step.dropped.values()))
        dropped = {
            reason: (documents.mid - out.mid) * number / gone
            for reason, number in step.dropped.items()
        }
        steps.append(StepEstimate(
            name=step.name, compares=step.compares, dropped=dropped,
            documents_in=documents, documents_out=_wider(out, spread[step.stage]),
            bytes_out=_wider(text, spread[step.stage]),
            sample_share=step.documents_out / max(1, step.documents_in),
        ))  # fmt: skip
        documents = out
    for stage in largest.stages:
        reading.setdefault(stage.name, text)
        if stage.name != largest.steps[0].stage:
            reading[stage.name] = _wider(reading[stage.name], spread[stage.name])
    bytes_out = max(1, largest.steps[-1].bytes_out)
    return Estimate(
        share=draw.share, records=_wider(records, _file_error(draw, {})), steps=tuple(steps),
        seconds={s.name: _seconds(trials, s.name, reading[s.name]) for s in largest.stages},
        disk_bytes=_sum([
            reading[stage.name].scaled(stage.disk_bytes / max(1, stage.bytes_in))
            for stage in largest.stages
        ]),
        tokens=steps[-1].bytes_out.scaled(largest.tokens / bytes_out),
        vocab_size=largest.vocab_size,
    )  # fmt: skip


def _kept(draw: Draw, trials: Sequence[Trial], index: int, unit: str) -> Range:
    """Return the share of documents or bytes of the whole that a step keeps."""
    seen = []
    for part, trial in zip(NESTED, trials, strict=True):
        step = trial.steps[index]
        total = getattr(step, f"{unit}_in")
        removed = total - getattr(step, f"{unit}_out")
        seen.append(Seen(draw.share * part, total, removed))
    step = trials[-1].steps[index]
    if step.compares:
        gone = grow(seen)
        return Range(1 - gone.high, 1 - gone.mid, 1 - gone.low)
    if step.name in AFTER_STAGES:
        return Range(1.0, 1.0, 1.0)
    share = 1 - seen[-1].removed / seen[-1].total if seen[-1].total else 1.0
    error = 0.0
    if draw.share < 1.0:
        error = _error(1 - share, step.documents_in)
    return Range(max(0.0, share - error), share, min(1.0, share + error))


def _file_error(draw: Draw, kept: dict[str, int]) -> float:
    """Relative half width of an interval from reading some of the files only."""
    number, files = len(draw.files), draw.num_files
    read = sum(file.size for file in draw.files)
    if number >= files or not read:
        return 0.0
    if number == 1:
        return 1.0
    known = kept and all(file.shards or not file.chosen for file in draw.files)
    values = [kept.get(f.shards, 0) if known else f.records for f in draw.files]
    rate = sum(values) / read
    squares = sum((v - rate * f.size) ** 2 for v, f in zip(values, draw.files, strict=True))
    variance = (1 - number / files) * number / (number - 1) * squares
    return min(1.0, _DEVIATIONS * math.sqrt(variance) / max(1, sum(values)))


def _wider(value: Range, relative: float) -> Range:
    """Widen a range by an error that is independent of its own."""
    low = math.hypot(1 - value.low / value.mid, relative) if value.mid else 0.0
    high = math.hypot(value.high / value.mid - 1, relative) if value.mid else 0.0
    return Range(value.mid * max(0.0, 1 - low), value.mid, value.mid * (1 + high))


def _seconds(trials: Sequence[Trial], stage: str, reading: Range) -> Range:
    """Return the time of a stage: a fixed part, and one that grows with the text it reads.

    The first trial is left out: it has paid for starting workers and loading models.
    """
    points = [(s.bytes_in, s.seconds) for trial in trials for s in trial.stages if s.name == stage]
    (small, early), (large, late) = points[-2:]
    all_grows = reading.scaled(late / max(1, large))
    slope = (late - early) / (large - small) if large > small else 0.0
    if slope <= 0:
        return Range(late, all_grows.mid, all_grows.high)
    fixed = max(0.0, late - slope * large)
    slope = min(slope, late / max(1, large))
    return Range(
        fixed + slope * reading.low, fixed + slope * reading.mid,
        max(fixed + slope * reading.high, all_grows.high),
    )  # fmt: skip


def _sum(ranges: Sequence[Range]) -> Range:
    return Range(*(sum(values) for values in zip(*ranges, strict=True)))
