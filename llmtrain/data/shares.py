"""From the configured mixture to the shares of the sources over a run.

Floats of the configuration count as the decimals they print as, and powers are rounded to nine
digits, so that no platform computes another plan. A plan that reads a source more often than
mixture.max_epochs is refused here, before anything is spent.

    schedule = share_schedule(config.mixture, {"wiki": 9_000, "code": 1_000}, unit_tokens=2048,
                              num_tokens=10**9)
    schedule.integral(512)     # [Fraction(256, 5), Fraction(2304, 5)], code first
"""

from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from fractions import Fraction
from itertools import pairwise

from llmtrain.config.mixture import (
    AdaptiveMixture,
    ConstantMixture,
    CurriculumMixture,
    MixtureConfig,
    PhasesMixture,
    TemperatureMixture,
    UnimaxMixture,
    name_problem,
)
from llmtrain.data.adaptive import AdaptiveSchedule, Exp3
from llmtrain.data.journal import SHARE_UNIT, ShareChange
from llmtrain.data.phases import Phase, Shares, ShareSchedule, constant
from llmtrain.data.rounding import largest_remainder
from llmtrain.errors import ConfigError

MIN_SHARE = Fraction(1, 65_536)
"""Smallest share of a source that is on: a window in every full block."""
EXACT = Context(prec=30)
"""Powers are rounded in it in the same way on every platform."""
POWER_DIGITS = 9
"""Digits kept after the point of a weight that is a power."""


def share_schedule(
    config: MixtureConfig,
    num_windows: Mapping[str, int],
    *,
    unit_tokens: int,
    num_tokens: int,
    journal: Sequence[ShareChange] = (),
) -> ShareSchedule:
    """Return the schedule of ``config`` over the sources in order of their names.

    Args:
        config: the mixture section.
        num_windows: source name -> windows of an epoch.
        unit_tokens: tokens of a window.
        num_tokens: training tokens of the run.
        journal: what an adaptive mixture has decided.

    Raises:
        ConfigError: the mixture names other sources, a share is too small, or a source is read
            more often than the cap allows.
        DataError: the journal is not that of such a mixture.
    """
    if not num_windows:
        raise ConfigError("data.sources is empty; set data.sources.NAME=stores/NAME")
    if problem := name_problem(config, num_windows):
        raise ConfigError(problem)
    windows = {name: num_windows[name] for name in sorted(num_windows)}
    num_units = -(-num_tokens // unit_tokens)
    match config:
        case AdaptiveMixture():
            schedule: ShareSchedule = _adaptive(config, windows, unit_tokens, num_units, journal)
        case PhasesMixture():
            schedule = ShareSchedule(_phases(config, windows, unit_tokens))
        case CurriculumMixture():
            schedule = ShareSchedule(_turns(config, windows, num_units), num_units)
        case ConstantMixture() | TemperatureMixture() | UnimaxMixture():
            schedule = _constant(config, windows, num_units)
    if config.max_epochs is not None and not isinstance(config, AdaptiveMixture):
        _check_epochs(schedule, windows, config.max_epochs, num_units, unit_tokens)
    return schedule


def shares_of(
    weights: Mapping[str, float | int | Fraction], label: str = "mixture.weights.{}"
) -> Shares:
    """Turn weights into shares that sum to exactly 1, in the order of ``weights``.

    A float counts as the decimal it prints as: 0.1 is 1/10. A weight of 0 turns a source off.

    Args:
        weights: source name -> weight, 0 or more and not all 0.
        label: what the weight of a source is called in messages.

    Raises:
        ConfigError: a weight is under 1/65,536 of the sum.
    """
    exact = [w if isinstance(w, Fraction) else Fraction(repr(w)) for w in weights.values()]
    total = sum(exact, Fraction(0))
    shares = tuple(weight / total for weight in exact)
    small = [
        f"{label.format(name)} is {float(share):.3g} of the sum, the smallest share is 1/"
        f"{MIN_SHARE.denominator:,}; raise it, leave the source out, or merge it with another"
        for name, share in zip(weights, shares, strict=True)
        if 0 < share < MIN_SHARE
    ]
    if small:
        raise ConfigError(small)
    return shares


def _constant(
    config: ConstantMixture | TemperatureMixture | UnimaxMixture,
    windows: Mapping[str, int],
    num_units: int,
) -> ShareSchedule:
    planned_for = None
    match config:
        case ConstantMixture():
            shares = _given_or_by_windows(config.weights, windows)
        case TemperatureMixture():
            weights = by_temperature(windows, config.temperature)
            shares = shares_of(weights, "the weight of source {} by temperature")
        case UnimaxMixture():
            gives = unimax(windows, Fraction(repr(config.max_epochs)), num_units)
            shares = shares_of(gives, "the part of source {} by UniMax")
            if len(set(shares)) > 1:  # equal ones are equal over any number of windows
                planned_for = num_units
    return ShareSchedule([constant(0, shares)], planned_for)


def _given_or_by_windows(weights: Mapping[str, float] | None, windows: Mapping[str, int]) -> Shares:
    if weights is None:
        return shares_of(windows, "the size of source {}")
    return shares_of({name: weights[name] for name in windows})


def by_temperature(windows: Mapping[str, int], temperature: float) -> dict[str, Fraction]:
    """Return a weight of each source, windows ** (1 / temperature), over that of the largest."""
    largest = max(windows.values())
    weights = dict[str, Fraction]()
    for name, size in windows.items():
        logarithm = EXACT.ln(EXACT.divide(Decimal(size), Decimal(largest)))
        power = EXACT.exp(EXACT.divide(logarithm, Decimal(repr(temperature))))
        weights[name] = Fraction(round(power, POWER_DIGITS))
    return weights


def unimax(windows: Mapping[str, int], cap: Fraction, num_units: int) -> dict[str, Fraction]:
    """Return what each source gives to ``num_units`` (UniMax, arXiv:2304.09151, algorithm 1).

    From the smallest source up, each gives an equal part of what is left to give, at most ``cap``
    epochs.

    Raises:
        ConfigError: all sources together do not have so many windows within the cap.
    """
    most = cap * sum(windows.values())
    if most < num_units:
        raise ConfigError(
            f"the run takes {num_units:,} windows, mixture.max_epochs={float(cap):g} of all "
            f"sources give {int(most):,}; train on fewer tokens, add data or raise max_epochs to "
            f"at least {_up(Fraction(num_units, sum(windows.values())))}"
        )
    left, gives = Fraction(num_units), dict[str, Fraction]()
    for taken, name in enumerate(sorted(windows, key=lambda n: (windows[n], n))):
        gives[name] = min(left / (len(windows) - taken), cap * windows[name])
        left -= gives[name]
    return {name: gives[name] for name in windows}


def _phases(config: PhasesMixture, windows: Mapping[str, int], unit_tokens: int) -> list[Phase]:
    """Phases that begin with the first window at or after the end of the one before."""
    shares = [
        shares_of(
            {n: phase.weights.get(n, 0) for n in windows}, f"mixture.phases[{i}].weights.{{}}"
        )
        for i, phase in enumerate(config.phases)
    ]
    ends = [-(-(phase.until_tokens or 0) // unit_tokens) for phase in config.phases[:-1]]
    starts = [0, *ends]
    for i, (start, end) in enumerate(pairwise(starts)):
        if end == start:
            raise ConfigError(
                f"mixture.phases[{i}] ends at {config.phases[i].until_tokens} tokens, less than a "
                f"window of {unit_tokens} after it begins; make it longer or leave it out"
            )
    after = [*shares[1:], shares[-1]]
    return [
        Phase(start, own, following if phase.interpolation == "linear" else own)
        for start, own, following, phase in zip(starts, shares, after, config.phases, strict=True)
    ]


def _turns(config: CurriculumMixture, windows: Mapping[str, int], num_units: int) -> list[Phase]:
    """Linear phases in which one source after another has its turn.

    Sources stand on the line of the run one after another, each as long as its part of all
    windows. The shares at a window are the parts of the line within half the overlap around it;
    what reaches over an end of the run is folded back, so that every source gives exactly its part.
    Beyond the run's end all are in proportion.
    """
    places = [list(windows).index(name) for name in config.order]
    sizes = [windows[name] for name in config.order]
    parts = largest_remainder([Fraction(num_units * size, sum(sizes)) for size in sizes])
    edges = [sum(parts[:i]) for i in range(len(parts) + 1)]
    half = int(num_units * Fraction(repr(config.overlap)) / 2)
    if half == 0:
        own = [tuple(Fraction(i == place) for i in range(len(places))) for place in places]
        phases = [constant(e, s) for (e, f), s in zip(pairwise(edges), own, strict=True) if e < f]
        return [*phases, constant(num_units, shares_of(windows, "the size of source {}"))]
    images = {x for edge in edges for x in (edge, -edge, 2 * num_units - edge)}
    bends = {x + side for x in images for side in (-half, half)} | {0, num_units}
    corners = sorted(x for x in bends if 0 <= x <= num_units)
    shares = list[Shares]()
    for x in corners:
        below = [_folded(x - half, x + half, edge, num_units) for edge in edges]
        turn = [Fraction(b - a, 2 * half) for a, b in pairwise(below)]
        shares.append(tuple(turn[places.index(i)] for i in range(len(places))))
    phases = [
        Phase(x, here, there)
        for x, (here, there) in zip(corners[:-1], pairwise(shares), strict=True)
    ]
    return [*phases, constant(num_units, shares_of(windows, "the size of source {}"))]


def _folded(low: int, high: int, edge: int, end: int) -> int:
    """How much of [low, high] lies below ``edge`` when it is folded into [0, end] at both ends."""
    near = min(high, edge) - max(low, -edge)
    far = min(high, 2 * end + edge) - max(low, 2 * end - edge)
    return max(near, 0) + max(far, 0)


def _adaptive(
    config: AdaptiveMixture,
    windows: Mapping[str, int],
    unit_tokens: int,
    num_units: int,
    journal: Sequence[ShareChange],
) -> AdaptiveSchedule:
    interval = -(-config.interval_tokens // unit_tokens)
    explored = int(SHARE_UNIT * Fraction(repr(config.exploration)) / len(windows))
    if explored * interval < SHARE_UNIT:
        needed = -(-SHARE_UNIT // max(explored, 1)) * unit_tokens
        raise ConfigError(
            f"mixture.exploration={config.exploration} over {len(windows)} sources leaves less "
            f"than a window of one in mixture.interval_tokens={config.interval_tokens}; use an "
            f"interval of at least {needed} tokens or explore more"
        )
    most = tuple[Fraction, ...]()
    if config.max_epochs is not None:
        cap = Fraction(repr(config.max_epochs))
        unimax(windows, cap, num_units)  # refuses a run that no shares can keep below the cap
        most = tuple(cap * size for size in windows.values())
        for name, part in zip(windows, most, strict=True):
            if part * interval < num_units:
                raise ConfigError(
                    f"mixture.max_epochs={config.max_epochs:g} leaves source {name} less than one "
                    f"of its {windows[name]:,} windows in mixture.interval_tokens="
                    f"{config.interval_tokens}; use a longer interval or leave the source out"
                )
    rule = Exp3(
        interval=interval, learning_rate=config.learning_rate, exploration=config.exploration,
        loss_scale=config.loss_scale, most=most,
        num_units=num_units if most else None,
    )  # fmt: skip
    return AdaptiveSchedule(rule, _given_or_by_windows(config.weights, windows), journal)


def _check_epochs(
    schedule: ShareSchedule,
    windows: Mapping[str, int],
    max_epochs: float,
    num_units: int,
    unit_tokens: int,
) -> None:
    """Refuse a plan that reads a source more often than the cap allows."""
    cap = Fraction(repr(max_epochs))
    over = {
        name: target / size
        for (name, size), target in zip(windows.items(), schedule.integral(num_units), strict=True)
        if target > cap * size
    }
    problems = [
        f"source {name} is read {float(epochs):.4g} times in {num_units * unit_tokens:,} tokens, "
        f"mixture.max_epochs={max_epochs:g}; lower its share, train on fewer tokens or raise the "
        f"cap to at least {_up(epochs)}"
        for name, epochs in over.items()
    ]
    if problems:
        raise ConfigError(problems)


def _up(value: Fraction) -> float:
    """The next number with three digits after the point."""
    return -(-value * 1000 // 1) / 1000
