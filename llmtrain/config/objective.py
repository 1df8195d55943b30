"""What a run learns from: the next token, or which of two answers is better.

TrainingConfig(objective="dpo", dpo=DpoConfig(beta=0.1), ...)
"""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import not_positive
from llmtrain.errors import ConfigError

Objective = Literal["next_token", "dpo"]
"""What the loss is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimisation (arXiv:2305.18290)."""

    beta: float = 0.1
    """How strongly the model is held to the reference: the factor of log-ratios in rewards."""
    label_smoothing: float = 0.0
    """Assumed share of pairs whose answers are the wrong way round, below 0.5."""

    def __post_init__(self) -> None:
        """Refuse a beta that is not above 0, and a share of half the pairs or more."""
        problems = not_positive(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            problems.append(
                f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5"
            )
        if problems:
            raise ConfigError(problems)
