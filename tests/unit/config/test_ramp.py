"""What every step takes while batch and length grow, against a loop that counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.ramp import BatchStage, LengthStage, StepSchedule
from llmtrain.config.training import TrainingConfig
from llmtrain.errors import ConfigError

UNIT = 8


def counted(
    batch_ramp: list[tuple[int, int]], length_ramp: list[tuple[int, int]], last: int, num_steps: int
) -> list[tuple[int, int, int]]:
    """(first unit, units, length) of every step: the stage is that of the tokens seen before."""
    shapes, unit = [], 0
    for _ in range(num_steps):
        seen = unit * UNIT
        units = next((n for end, n in batch_ramp if seen < end), last)
        length = next((n for end, n in length_ramp if seen < end), UNIT)
        shapes.append((unit, units, length))
        unit += units
    return shapes


ENDS = st.lists(st.integers(1, 700), max_size=4, unique=True).map(sorted)


@settings(max_examples=60)
@given(batch_ends=ENDS, length_ends=ENDS, data=st.data(), last=st.integers(1, 9))
def test_shapes_are_those_of_counting(
    batch_ends: list[int], length_ends: list[int], data: st.DataObject, last: int
) -> None:
    batches = [(end, data.draw(st.integers(1, 9))) for end in batch_ends]
    lengths = [(end, data.draw(st.sampled_from([1, 2, 4, 8]))) for end in length_ends]
    steps = StepSchedule(
        UNIT,
        last * UNIT,
        [BatchStage(until_tokens=end, global_batch_tokens=n * UNIT) for end, n in batches],
        [LengthStage(until_tokens=end, sequence_length=n) for end, n in lengths],
    )
    expected = counted(batches, lengths, last, 150)
    assert [tuple(steps.shape(step)) for step in range(150)] == expected
    for step, (first, units, _) in enumerate(expected):
        assert steps.tokens(step) == first * UNIT
        assert {steps.step_of(unit) for unit in range(first, first + units)} == {step}
        assert steps.num_steps((first + units) * UNIT) == step + 1
        assert steps.num_steps(first * UNIT + 1) == step + 1


def test_ramps_end_in_order() -> None:
    stages = tuple(BatchStage(until_tokens=n, global_batch_tokens=UNIT) for n in (9, 9))
    with pytest.raises(ConfigError, match=r"batch_ramp\[1\]\.until_tokens=9 must be above"):
        TrainingConfig(num_tokens=99, batch_ramp=stages)
    with pytest.raises(ConfigError, match="until_tokens=0 must be at least 1"):
        LengthStage(until_tokens=0, sequence_length=1)
