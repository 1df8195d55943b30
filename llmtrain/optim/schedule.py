"""Learning rate as a pure function of tokens seen: the same for every batch size and layout.

``tokens`` is the number of training tokens seen once the step is done: the first step of a warm-up
already moves, and the last step of a run has the final rate.

    lr = learning_rate(OptimizerConfig(), ScheduleConfig(warmup_tokens=1000), num_tokens=100_000)
    lr(500)  # half of the peak
"""

import math
from collections.abc import Callable

from llmtrain.config.training import OptimizerConfig, ScheduleConfig

Schedule = Callable[[int], float]
"""Tokens seen at the end of a step -> learning rate of that step."""

FLOOR = 0.1
"""Rate at the end as a share of the peak, where ``schedule.final_lr_ratio`` names none."""

Curve = Callable[[float], float]
"""Share of the fall that is done, in [0, 1] -> share of the height that is left, from 1 to 0."""

CURVES: dict[str, Curve] = {
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "linear": lambda done: 1.0 - done,
    "wsd": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
}
"""How the rate falls from the peak to the floor, by ``schedule.kind``."""


def learning_rate(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, num_tokens: int
) -> Schedule:
    """Make the schedule of a run of ``num_tokens`` training tokens.

    ``wsd`` is warm-up, stable, decay (arXiv:2404.06395, section 4.2).
    """
    curve = CURVES[schedule.kind]
    fall_start = _fall_start(schedule, num_tokens)
    fall_length = num_tokens - fall_start
    floor = FLOOR if schedule.final_lr_ratio is None else schedule.final_lr_ratio

    def at(tokens: int) -> float:
        if tokens < schedule.warmup_tokens:
            return optimizer.lr * tokens / schedule.warmup_tokens
        if tokens <= fall_start:
            return optimizer.lr
        done = min(1.0, (tokens - fall_start) / fall_length) if fall_length > 0 else 1.0
        return optimizer.lr * (floor + (1.0 - floor) * curve(done))

    return at


def _fall_start(schedule: ScheduleConfig, num_tokens: int) -> int:
    """Tokens at which the rate leaves the peak; never before the end of the warm-up."""
    if schedule.kind != "wsd":
        return schedule.warmup_tokens
    decay = num_tokens // 10 if schedule.decay_tokens is None else schedule.decay_tokens
    return max(schedule.warmup_tokens, num_tokens - decay)
