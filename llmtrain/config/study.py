"""What ``hydra.sweeper.study`` holds in the files of ready studies, ``conf/experiment/``.

A study is a design of trials, a fit to what they measure, and trials that were held out to check
what the fit foretells. Its own words are overrides, written as on the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below, not_positive, outside
from llmtrain.errors import ConfigError

Words = tuple[str, ...]
"""Overrides of one size of model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LrBatchStudy:
    """Learning rate against batch: a grid, a parabola for each batch, one run at the least loss."""

    kind: Literal["lr_batch"] = "lr_batch"
    """Grid of learning rate and batch."""
    learning_rates: tuple[float, ...]
    """Values of optimizer.lr, at least 3."""
    batch_tokens: tuple[int, ...]
    """Values of training.global_batch_tokens."""

    def __post_init__(self) -> None:
        """Refuse a grid that shows no curve."""
        problems = _rates(self.learning_rates)
        if not self.batch_tokens or min(self.batch_tokens) < 1:
            problems.append(f"batch_tokens={list(self.batch_tokens)} must hold numbers of tokens")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthTransferStudy:
    """Whether the best learning rate stays over widths: muP beside the standard parametrization."""

    kind: Literal["width_transfer"] = "width_transfer"
    """Learning rates over widths."""
    learning_rates: tuple[float, ...]
    """Values of optimizer.lr, at least 3."""
    base_width: int
    """model.mup_base_width of the runs with muP."""
    sizes: tuple[Words, ...]
    """Overrides of each size, the narrowest first; all of one head_dim."""
    held_out: Words
    """Overrides of the wide model that is trained at the rate the narrowest tells."""

    def __post_init__(self) -> None:
        """Refuse fewer than two widths."""
        problems = _rates(self.learning_rates) + below(self, 1, "base_width")
        if len(self.sizes) < 2:
            problems.append(f"sizes holds {len(self.sizes)} sizes; name at least 2")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLadderStudy:
    """Sizes times lengths, the law of their losses, and a bigger run that checks it."""

    kind: Literal["scaling_ladder"] = "scaling_ladder"
    """Fit of the loss over size and length."""
    sizes: tuple[Words, ...]
    """Overrides of each size, at least 3."""
    tokens: tuple[int, ...]
    """Values of training.num_tokens, at least 3."""
    held_out: Words
    """Overrides of the size of the held-out run."""
    held_out_tokens: int
    """Its training.num_tokens."""
    repeats: int = 2
    """Runs of the first size and length with other seeds, which tell the noise."""
    confidence: float = 0.9
    """Share of outcomes that intervals hold."""
    num_resamples: int = 200
    """Refits that intervals come from."""

    def __post_init__(self) -> None:
        """Refuse a ladder that no law could be fitted to."""
        problems = _interval(self) + below(self, 1, "held_out_tokens") + below(self, 0, "repeats")
        for name in ("sizes", "tokens"):
            if len(values := getattr(self, name)) < 3:
                problems.append(f"{name} holds {len(values)} values; the law needs at least 3")
        if min(self.tokens, default=1) < 1:
            problems.append(f"tokens={list(self.tokens)} must hold numbers of tokens")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSearchStudy:
    """Small runs on random shares, the law of their losses, and the shares it finds best."""

    kind: Literal["mixture_search"] = "mixture_search"
    """Fit of every source's held-out loss over the shares."""
    num_mixtures: int = 16
    """Random mixtures that are trained."""
    concentration: float = 4.0
    """Of the Dirichlet distribution around the natural shares; larger is nearer to them."""
    min_share: float = 0.03
    """Least share of any source in a random mixture."""
    seed: int = 0
    """Of the random mixtures and of the resampling."""
    objective: Mapping[str, float] | None = None
    """Source -> weight of its held-out loss in what is to be least; null weighs all alike."""
    repeats: int = 1
    """Runs of both held-out mixtures with further seeds; measured is the mean."""
    confidence: float = 0.9
    """Share of outcomes that intervals hold."""
    num_resamples: int = 200
    """Refits that intervals come from."""

    def __post_init__(self) -> None:
        """Refuse ranges that hold nothing."""
        problems = _interval(self) + below(self, 1, "num_mixtures")
        problems += below(self, 0, "repeats", "seed") + not_positive(self, "concentration")
        problems += outside(self, 0.0, 0.5, "min_share")
        weights = self.objective or {}
        if any(not weight >= 0 for weight in weights.values()) or (
            weights and not sum(weights.values()) > 0
        ):
            problems.append(f"objective={dict(weights)} must hold weights of at least 0, one above")
        _refuse(problems)


Study = LrBatchStudy | WidthTransferStudy | ScalingLadderStudy | MixtureSearchStudy
"""A ready study, chosen by ``kind``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """``hydra.sweeper`` of ``llmtrain train --multirun`` with ``hydra/sweeper=study``."""

    study: Study
    """What is trained and fitted."""


def _rates(rates: tuple[float, ...]) -> list[str]:
    if len(set(rates)) >= 3 and min(rates) > 0:
        return []
    return [f"learning_rates={list(rates)} must hold at least 3 different rates above 0"]


def _interval(config: ScalingLadderStudy | MixtureSearchStudy) -> list[str]:
    problems = below(config, 10, "num_resamples")
    if not 0 < config.confidence < 1:
        problems.append(f"confidence={config.confidence} must be between 0 and 1")
    return problems


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)
