"""Bytes that a rank holds under DeepSpeed's ZeRO, in closed form.

Invariant: the numbers are those of DeepSpeed's own storage, its paddings and second copies
included, wherever that storage lies: offloading moves bytes to the host and counts them alike.

    zero_state_bytes(shapes, engine, num_moments=2, ranks=8).total
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtrain.config.engine import EngineConfig

_FP32 = 4
COUNTER_BYTES = 4
"""The number of updates made, which optimizers keep for each tensor."""

_ALIGNMENT = 2
"""Flattened groups are padded to a multiple of this times the number of ranks (ZeRO 1 and 2)."""

_PERSISTENT = 100_000
"""Parameters of at most as many elements stay gathered under ZeRO 3 where nothing else is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """What one rank holds between steps, in bytes."""

    parameters: int
    """Everything that holds values of parameters: shards, masters, bf16 copies."""
    gradients: int
    """Gradients as they lie when the optimizer runs."""
    optimizer: int
    """State of the optimizer."""

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.parameters + self.gradients + self.optimizer


def zero_state_bytes(
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    engine: EngineConfig,
    num_moments: int,
    ranks: int,
) -> StateBytes:
    """Count the state of one of ``ranks`` data-parallel ranks, which all hold as much.

    Args:
        shapes: parameters of the rank's pipeline stage.
        engine: precision and ZeRO stage.
        num_moments: tensors of a parameter's size that the optimizer keeps.
        ranks: data-parallel ranks.
    """
    low = 2 if engine.precision == "bf16" else _FP32
    sizes = [math.prod(shape) for _, shape in shapes]
    decayed = sum(math.prod(shape) for _, shape in shapes if len(shape) > 1)
    groups = [size for size in (decayed, sum(sizes) - decayed) if size]
    counters = COUNTER_BYTES * len(groups)
    match engine.deepspeed.zero_stage:
        case 0:
            whole = sum(sizes)
            return StateBytes(
                parameters=whole * (_FP32 + (low if low < _FP32 else 0)),
                gradients=whole * _FP32,
                optimizer=num_moments * whole * _FP32 + COUNTER_BYTES * len(sizes),
            )
        case 3:
            part = sum(-(-size // ranks) for size in sizes)
            limit = _persistence_threshold(engine.deepspeed.config)
            gathered = sum(size for size in sizes if size <= limit)
            return StateBytes(
                parameters=part * (low + _FP32) + gathered * low,
                gradients=part * _FP32,
                optimizer=num_moments * part * _FP32 + counters,
            )
        case stage:
            unit = _ALIGNMENT * ranks
            flat = sum(-(-size // unit) * unit for size in groups)
            part = flat // ranks
            # ZeRO 1 in bf16 keeps whole gradients: bf16 as computed, fp32 as accumulated
            whole_gradients = stage == 1 and low < _FP32
            return StateBytes(
                parameters=flat * low + part * _FP32,
                gradients=flat * _FP32 + sum(sizes) * low if whole_gradients else part * _FP32,
                optimizer=num_moments * part * _FP32 + counters,
            )


def _persistence_threshold(config: Mapping[str, object]) -> int:
    """Read the threshold among DeepSpeed's own keys, under either of its names."""
    zero = config.get("zero_optimization")
    for name in ("stage3_param_persistence_threshold", "param_persistence_threshold"):
        value = zero.get(name) if isinstance(zero, Mapping) else None
        if isinstance(value, (int, float)):
            return int(value)
    return _PERSISTENT
