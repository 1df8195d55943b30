"""In which shares the sources are mixed, over the whole run or from phase to phase.

Shares are shares of the training tokens. Weights are either shares that sum to 1 or whole numbers
that stand for ratios; anything else is refused with the shares it would have to be.

    mixture.weights={wiki: 0.7, code: 0.3}          # with the default file, conf/mixture/
    mixture=temperature mixture.temperature=3.3
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from llmtrain.config.fields import FATAL, not_positive, outside
from llmtrain.errors import ConfigError

SUM_TOLERANCE = Fraction(1, 10**6)
"""How far the sum of shares may be from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantMixture:
    """The same shares from the first step to the last."""

    kind: Literal["constant"] = field(default="constant", metadata=FATAL)
    """Constant shares."""
    weights: Mapping[str, float] | None = field(default=None, metadata=FATAL)
    """Source name -> share (they sum to 1) or ratio (whole numbers). Null: by their windows."""
    max_epochs: float | None = None
    """Most times the run may read any source; a plan that reads more is refused. Null: no limit."""

    def __post_init__(self) -> None:
        """Refuse weights that are no shares."""
        _refuse(weight_problems("weights", self.weights) + not_positive(self, "max_epochs"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TemperatureMixture:
    """Constant shares in proportion to windows ** (1 / temperature)."""

    kind: Literal["temperature"] = field(default="temperature", metadata=FATAL)
    """Shares by a power of the size."""
    temperature: float = field(default=1.0, metadata=FATAL)
    """1 is in proportion to windows; the larger, the more equal the shares."""
    max_epochs: float | None = None
    """Most times the run may read any source; a plan that reads more is refused. Null: no limit."""

    def __post_init__(self) -> None:
        """Refuse temperatures that are none."""
        _refuse(not_positive(self, "temperature", "max_epochs"))


@dataclass(frozen=True, kw_only=True, slots=True)
class UnimaxMixture:
    """Constant shares, as equal as the cap on epochs lets them be (UniMax, arXiv:2304.09151)."""

    kind: Literal["unimax"] = field(default="unimax", metadata=FATAL)
    """Equal shares under a cap."""
    max_epochs: float = 4.0
    """Most times the run reads any source; what small sources cannot give, larger ones do."""

    def __post_init__(self) -> None:
        """Refuse caps that are none."""
        _refuse(not_positive(self, "max_epochs"))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixturePhase:
    """A part of the run with its own shares."""

    until_tokens: int | None = None
    """Training tokens at which it ends, rounded up to a window; null for the last phase."""
    weights: Mapping[str, float]
    """Source name -> share or ratio; sources left out give nothing in this phase."""
    interpolation: Literal["step", "linear"] = "step"
    """step: these shares until the end. linear: they move in a straight line over the phase, from
    these at its beginning to those of the next phase at its end."""

    def __post_init__(self) -> None:
        """Refuse weights that are no shares, and an end before the first token."""
        problems = weight_problems("weights", self.weights, zero=True)
        if self.until_tokens is not None and self.until_tokens < 1:
            problems.append(f"until_tokens={self.until_tokens} must be at least 1")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhasesMixture:
    """Shares that change at token boundaries: warm-up, stages, annealing."""

    kind: Literal["phases"] = field(default="phases", metadata=FATAL)
    """One set of shares after another."""
    phases: tuple[MixturePhase, ...] = field(metadata=FATAL)
    """In order; the last ends with the run."""
    max_epochs: float | None = None
    """Most times the run may read any source; a plan that reads more is refused. Null: no limit."""

    def __post_init__(self) -> None:
        """Refuse phases that do not follow one another."""
        problems = not_positive(self, "max_epochs")
        if not self.phases:
            problems.append("phases is empty; give at least one: phases=[{weights: {NAME: 1}}]")
        ends = [phase.until_tokens for phase in self.phases]
        for i, (end, after) in enumerate(pairwise(ends)):
            if end is None:
                problems.append(
                    f"phases[{i}].until_tokens=null, but {len(ends) - 1 - i} phases follow; give "
                    "the tokens at which it ends"
                )
            elif after is not None and after <= end:
                problems.append(
                    f"phases[{i + 1}].until_tokens={after} is not after "
                    f"phases[{i}].until_tokens={end}; put the phases in order of their ends"
                )
        if self.phases and self.phases[-1].interpolation == "linear":
            problems.append(
                f"phases[{len(ends) - 1}].interpolation=linear, but no phase follows whose shares "
                "it could move to; add one or use step"
            )
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumMixture:
    """Sources from easy to hard; by the end each is used in proportion to its windows."""

    kind: Literal["curriculum"] = field(default="curriculum", metadata=FATAL)
    """One source after another, sliding over."""
    order: tuple[str, ...] = field(metadata=FATAL)
    """All source names, the easiest first; each is one store, for example one range of scores."""
    overlap: float = field(default=0.25, metadata=FATAL)
    """Part of the run over which the turns of sources are spread: 0 is one after another."""
    max_epochs: float | None = None
    """Most times the run may read any source; a plan that reads more is refused. Null: no limit."""

    def __post_init__(self) -> None:
        """Refuse names given twice and an overlap beyond the run."""
        problems = outside(self, 0, 1, "overlap") + not_positive(self, "max_epochs")
        twice = sorted({name for name in self.order if self.order.count(name) > 1})
        problems += [f"order names {name} twice; name every source once" for name in twice]
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveMixture:
    """Shares chosen on the way from the loss of each source (Exp3; arXiv:2312.02406)."""

    kind: Literal["adaptive"] = field(default="adaptive", metadata=FATAL)
    """Shares follow the losses."""
    weights: Mapping[str, float] | None = field(default=None, metadata=FATAL)
    """Source name -> share or ratio to begin with. Null: by their windows."""
    interval_tokens: int = field(default=100_000_000, metadata=FATAL)
    """Training tokens between two decisions, rounded up to a window.

    What is learnt in one interval decides on the one after the next, so reading ahead never waits.
    """
    learning_rate: float = field(default=0.1, metadata=FATAL)
    """How far one interval moves the logarithm of a weight: this times loss / loss_scale."""
    exploration: float = field(default=0.1, metadata=FATAL)
    """Part of the tokens that is shared out equally whatever the losses are."""
    loss_scale: float = field(default=10.0, metadata=FATAL)
    """Mean loss in nats that is the highest reward, 1; a higher loss counts the same."""
    max_epochs: float | None = None
    """Most times the run may read any source: shares are held below what would. Null: no limit."""

    def __post_init__(self) -> None:
        """Refuse weights that are no shares and rates out of range."""
        problems = weight_problems("weights", self.weights)
        names = ("interval_tokens", "learning_rate", "exploration", "loss_scale", "max_epochs")
        problems += not_positive(self, *names)
        if self.exploration > 1:
            problems.append(f"exploration={self.exploration} must be at most 1")
        _refuse(problems)


MixtureConfig = (
    ConstantMixture
    | TemperatureMixture
    | UnimaxMixture
    | PhasesMixture
    | CurriculumMixture
    | AdaptiveMixture
)
"""The mixture section, chosen by its ``kind``."""


def name_problem(config: MixtureConfig, sources: Iterable[str]) -> str | None:
    """Say which names of the mixture are no source, and which sources it leaves out."""
    named, known = _named_sources(config), sorted(sources)
    if named is None:
        return None
    parts = [
        f"{where} names {name}, no source of data.sources"
        for where, names in named.items()
        for name in sorted(set(names).difference(known))
    ]
    where = next(iter(named)).split("[")[0]
    missing = sorted(set(known).difference(*named.values()))
    parts += [f"{where} gives no share to the source {name}" for name in missing]
    if not parts:
        return None
    return f"{'; '.join(parts)}; name exactly the sources: {', '.join(known) or 'none'}"


def _named_sources(config: MixtureConfig) -> dict[str, list[str]] | None:
    """Names the mixture gives shares to, by the field that does; None where it takes all."""
    if isinstance(config, PhasesMixture):
        return {
            f"mixture.phases[{i}].weights": [
                name for name, weight in phase.weights.items() if weight
            ]
            for i, phase in enumerate(config.phases)
        }
    if isinstance(config, CurriculumMixture):
        return {"mixture.order": list(config.order)}
    if isinstance(config, ConstantMixture | AdaptiveMixture) and config.weights is not None:
        return {"mixture.weights": list(config.weights)}
    return None


def weight_problems(
    name: str, weights: Mapping[str, float] | None, *, zero: bool = False
) -> list[str]:
    """What is wrong with shares or ratios; ``zero``: whether a source may be switched off."""
    if weights is None:
        return []
    low = "at least 0" if zero else "above 0"
    problems = [
        f"{name}.{source}={weight} must be {low} and finite; leave out sources not used"
        for source, weight in weights.items()
        if not math.isfinite(weight) or weight < 0 or (weight == 0 and not zero)
    ]
    if problems:
        return problems
    exact = {source: Fraction(repr(weight)) for source, weight in weights.items()}
    total = sum(exact.values(), Fraction(0))
    if total == 0:
        return [f"{name} gives no source a share; give at least one a weight above 0"]
    if all(weight.denominator == 1 for weight in exact.values()) or (
        abs(total - 1) <= SUM_TOLERANCE
    ):
        return []
    shares = ", ".join(f"{source}: {float(w / total):.6g}" for source, w in exact.items())
    return [
        f"{name} sums to {float(total):.7g}; use shares that sum to 1, for example {{{shares}}}, "
        "or whole numbers as ratios"
    ]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)
