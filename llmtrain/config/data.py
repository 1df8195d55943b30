"""Where the tokens are and in which shares they are mixed."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmtrain.config.fields import FATAL, FATAL_NAMES, below
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token stores by source name."""

    sources: Mapping[str, str] = field(default_factory=dict, metadata=FATAL_NAMES)
    """Source name -> folder of its token store, for training.

    A store may move during a run: its content is compared with the checkpoint's fingerprint.
    """
    validation: Mapping[str, str] = field(default_factory=dict)
    """Source name -> folder of its held-out token store."""
    prefetch_batches: int = 2
    """Global batches read ahead of the step in a background thread; 0 reads when asked."""

    def __post_init__(self) -> None:
        """Refuse names that cannot be keys and negative read-ahead."""
        problems = below(self, 0, "prefetch_batches")
        problems += [
            f"{section} holds the name '{name}'; use letters, digits, '_' and '-'"
            for section in ("sources", "validation")
            for name in getattr(self, section)
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """Shares of the training tokens each source gives."""

    weights: Mapping[str, float] | None = field(default=None, metadata=FATAL)
    """Source name -> share; normalised to sum 1. Null means in proportion to tokens."""

    def __post_init__(self) -> None:
        """Refuse shares that are no shares."""
        problems = [
            f"weights.{name}={weight} must be above 0 and finite; leave out sources not used"
            for name, weight in (self.weights or {}).items()
            if not (math.isfinite(weight) and weight > 0)
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer the stores were made with."""

    path: str | None = None
    """Tokenizer folder; checked against the stores' hash. Null skips the check and text output."""
