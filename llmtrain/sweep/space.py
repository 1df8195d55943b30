"""From the words of a sweep to Optuna's distributions, and from a suggestion back to words.

``choice(a,b)`` or ``a,b``: one of them; ``range(1,9,step=2)``: those numbers, the end left out;
``interval(a,b)``: anything between, ``int(interval(a,b))``: whole numbers; ``tag(log, ...)``: on a
logarithmic scale.

    space = Space.of(["optimizer.lr=tag(log,interval(1e-4,1e-2))"])
    space.words(study.ask(space.distributions).params)    # ["optimizer.lr=0.00123"]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from llmtrain.errors import ConfigError
from llmtrain.sweep.record import shown


@dataclass(frozen=True, slots=True)
class Space:
    """The swept fields."""

    distributions: Mapping[str, BaseDistribution]
    """Name -> where its values come from."""
    choices: Mapping[str, Mapping[Any, str]]
    """Name -> value -> the word that stands for it, where there is a choice."""

    @classmethod
    def of(cls, words: Sequence[str]) -> "Space":
        """Read swept words.

        Raises:
            ConfigError: every word that is no sweep or an empty one.
        """
        distributions, choices = dict[str, BaseDistribution](), dict[str, Mapping[Any, str]]()
        problems = []
        for override in OverridesParser.create().parse_overrides(list(words)):
            name = override.get_key_element().lstrip("+")
            try:
                if override.is_choice_sweep():
                    choices[name] = _choices(override)
                distributions[name] = _distribution(override, choices.get(name))
            except ValueError as error:
                problems.append(f"{override.input_line}: {error}")
        if problems:
            raise ConfigError(problems)
        return cls(distributions, choices)

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """The overrides of a point."""
        return [f"{name}={self.choices.get(name, {}).get(value) or shown(value)}"
                for name, value in values.items()]  # fmt: skip

    def grid(self) -> dict[str, list[Any]]:
        """All values of every field.

        Raises:
            ConfigError: a field with any value of an interval.
        """
        found = dict[str, list[Any]]()
        for name, each in self.distributions.items():
            if isinstance(each, CategoricalDistribution):
                found[name] = list(each.choices)
            elif isinstance(each, IntDistribution) and not each.log:
                found[name] = list(range(each.low, each.high + 1, each.step))
            elif isinstance(each, FloatDistribution) and each.step is not None:
                steps = round((each.high - each.low) / each.step)
                found[name] = [each.low + i * each.step for i in range(steps + 1)]
            else:
                raise ConfigError(f"hydra.sweeper.sampler=grid cannot list {name}; use choice(...)")
        return found


def _choices(override: Override) -> dict[Any, str]:
    """Values of a choice with their words; what Optuna cannot keep is its own word."""
    values = override.sweep_iterator(transformer=Transformer.encode)
    words = override.sweep_string_iterator()
    return {v if v is None or isinstance(v, int | float | str) else w: w
            for v, w in zip(values, words, strict=True)}  # fmt: skip


def _distribution(override: Override, choices: Mapping[Any, str] | None) -> BaseDistribution:
    """Where the values of a field come from; ValueError where that is nowhere."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return CategoricalDistribution(list(choices or ()))
    if not isinstance(value, IntervalSweep | RangeSweep):
        raise ValueError("names one value; write choice(...), range(...) or interval(...)")
    log = "log" in value.tags
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None:
            raise ValueError("needs both ends")
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(float(low), float(high), log=log)
    low, high, step = value.start, value.stop, value.step
    if low is None or high is None or not step > 0 or not low < high:
        raise ValueError("needs a start below its end and a step above 0")
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int):
        return IntDistribution(low, low + (high - 1 - low) // step * step, step=step)
    count = len(list(value.range()))
    return FloatDistribution(float(low), float(low + (count - 1) * step), step=float(step))
