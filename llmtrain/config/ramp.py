"""How long and how wide every step of a run is: ramps of batch and sequence length over tokens.

A *unit* is a window of the longest sequence length S_max of one source. Every step takes whole
units in order; while the sequence length is S_max / k, each unit gives k rows. A stage of a ramp
ends with the first step that has seen its tokens, so everything is integer arithmetic on the step.

    steps = StepSchedule(4096, 1 << 22, batch_ramp=(BatchStage(until_tokens=10**9,
                         global_batch_tokens=1 << 20),))
    steps.shape(0)    # StepShape(first_unit=0, num_units=256, sequence_length=4096)
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStage:
    """A smaller batch at the beginning of a run."""

    until_tokens: int
    """Training tokens at which the stage ends; the step that reaches them is its last."""
    global_batch_tokens: int
    """Tokens in one optimizer step until then; a multiple of training.sequence_length."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if problems := below(self, 1, "until_tokens", "global_batch_tokens"):
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthStage:
    """Shorter sequences at the beginning of a run."""

    until_tokens: int
    """Training tokens at which the stage ends; the step that reaches them is its last."""
    sequence_length: int
    """Tokens in one row until then; divides training.sequence_length."""

    def __post_init__(self) -> None:
        """Refuse counts below 1."""
        if problems := below(self, 1, "until_tokens", "sequence_length"):
            raise ConfigError(problems)


class StepShape(NamedTuple):
    """What one step takes from the stream of units."""

    first_unit: int
    """Units taken by all steps before it."""
    num_units: int
    """Units it takes itself."""
    sequence_length: int
    """Length of its rows; unit length // sequence_length rows come from a unit."""


class _Stage(NamedTuple):
    """Steps of one shape."""

    first_step: int
    first_unit: int
    units_per_step: int
    sequence_length: int


class StepSchedule:
    """The shape of every 0-based step; cheap to make and to ask."""

    def __init__(
        self,
        sequence_length: int,
        global_batch_tokens: int,
        batch_ramp: Sequence[BatchStage] = (),
        length_ramp: Sequence[LengthStage] = (),
    ) -> None:
        """End with rows of ``sequence_length`` and ``global_batch_tokens`` after all ramps."""
        self.unit_tokens = sequence_length
        ends = {s.until_tokens for s in batch_ramp} | {s.until_tokens for s in length_ramp}
        stages, step, unit, seen = list[_Stage](), 0, 0, 0
        for end in [*sorted(ends), None]:
            batch = next((s.global_batch_tokens for s in batch_ramp if seen < s.until_tokens), None)
            length = next((s.sequence_length for s in length_ramp if seen < s.until_tokens), None)
            units = (batch or global_batch_tokens) // sequence_length
            stage = _Stage(step, unit, units, length or sequence_length)
            num_steps = 0 if end is None else -(-(end - seen) // (units * sequence_length))
            if end is None or num_steps > 0:
                stages.append(stage)
                step, unit = step + num_steps, unit + num_steps * units
                seen = unit * sequence_length
        self._stages = tuple(stages)
        self._first_steps = [stage.first_step for stage in stages]
        self._first_units = [stage.first_unit for stage in stages]

    def shape(self, step: int) -> StepShape:
        """Return what 0-based step ``step`` takes."""
        if step < 0:
            raise IndexError(f"steps count from 0, found {step}")
        first_step, first_unit, units, length = self._stages[
            bisect_right(self._first_steps, step) - 1
        ]
        return StepShape(first_unit + (step - first_step) * units, units, length)

    def tokens(self, step: int) -> int:
        """Return the training tokens of the first ``step`` steps."""
        return self.shape(step).first_unit * self.unit_tokens

    def step_of(self, unit: int) -> int:
        """Return the 0-based step that takes ``unit``."""
        first_step, first_unit, units, _ = self._stages[bisect_right(self._first_units, unit) - 1]
        return first_step + (unit - first_unit) // units

    def num_steps(self, num_tokens: int) -> int:
        """Return the fewest steps that take at least ``num_tokens`` training tokens."""
        return self.step_of(-(-num_tokens // self.unit_tokens) - 1) + 1 if num_tokens > 0 else 0

    def shapes(self) -> list[tuple[int, int]]:
        """Return (units per step, sequence length) of every stage, in order."""
        return [(stage.units_per_step, stage.sequence_length) for stage in self._stages]
