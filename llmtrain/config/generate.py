"""What ``llmtrain generate`` and ``llmtrain eval`` take: a run, and how to sample or score."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """One call of ``llmtrain generate``."""

    run: str
    """Run folder; its newest good checkpoint is used."""
    step: int | None = None
    """Optimizer step of the checkpoint; null means the newest good one."""
    prompt: str | tuple[str, ...] = ""
    """Text to continue, or several; empty starts a new document."""
    num_samples: int = 1
    """Continuations of each prompt."""
    max_new_tokens: int = 128
    """Tokens to add at most; a continuation also stops at the end of its document."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only; null means all."""
    top_p: float | None = 0.95
    """Sample among the likeliest tokens that hold this probability; null means all."""
    seed: int = 0
    """Seed of the sampling."""
    save: bool = False
    """Also keep the samples in ``samples.json`` of the run folder, where the report finds them."""

    def __post_init__(self) -> None:
        """Refuse what no sampling can mean."""
        problems = below(self, 1, "num_samples", "max_new_tokens", "top_k")
        if self.temperature < 0:
            problems.append(f"temperature={self.temperature} must be 0 (likeliest token) or above")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} must lie above 0 and at most at 1, or be null")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """One call of ``llmtrain eval``."""

    run: str
    """Run folder; its newest good checkpoint is used and ``eval.json`` is written there."""
    step: int | None = None
    """Optimizer step of the checkpoint; null means the newest good one."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Source name -> folder of a held-out token store; none means the run's data.validation."""
    max_documents: int | None = None
    """Held-out documents to score per source, the first ones; null means all."""
    batch_tokens: int = 4096
    """Tokens scored at a time."""
    unigram_tokens: int = 100_000_000
    """Training tokens counted per source for the unigram model, the first ones."""

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        if problems := below(self, 1, "max_documents", "batch_tokens", "unigram_tokens"):
            raise ConfigError(problems)
