"""How sure a fit is: the same fit, to runs whose residuals were dealt out anew.

A residual bootstrap (Efron and Tibshirani 1993, section 9.5): a study has a dozen runs in a design,
and runs drawn with replacement would lack whole sizes or sources. Residuals are widened by what the
constants took out of them, and by another factor in every resample, as so few runs leave unsure how
large residuals are: one more run then falls as Student's t says, not as a normal value.

Invariant: resamples are a function of the seed and the runs.

    others = resample(refit, np.log(losses), residuals, num_constants=5, num_resamples=200, seed=0)
    span(others.constants[:, 0], confidence=0.9)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Resampled:
    """What the refits gave."""

    constants: Array
    """[num_resamples, constants]."""
    noise: Array
    """A residual for each resample, for what one more run would measure; [num_resamples]."""


def resample(
    refit: Callable[[Array], Array],
    measured: Array,
    residuals: Array,
    num_constants: int,
    num_resamples: int,
    seed: int,
) -> Resampled:
    """Refit to ``measured`` with residuals dealt out anew.

    Args:
        refit: measured values -> constants.
        measured: what was fitted, in the units of ``residuals``; [runs].
        residuals: measured minus fitted; [runs].
        num_constants: constants of the fit.
        num_resamples: number of refits.
        seed: of the drawing.
    """
    random = np.random.default_rng(seed)
    runs = len(residuals)
    spare = max(1, runs - num_constants)
    factors = np.sqrt(runs / random.chisquare(spare, num_resamples))
    centred = residuals - residuals.mean()
    dealt = factors[:, None] * random.choice(centred, size=(num_resamples, runs))
    constants = np.stack([refit(measured - residuals + noise) for noise in dealt])
    return Resampled(constants, factors * random.choice(centred, size=num_resamples))


def span(values: Array, confidence: float) -> tuple[float, float]:
    """The middle ``confidence`` of values."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return float(low), float(high)
