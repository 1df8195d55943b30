"""Every source's held-out loss as a function of the shares in which the sources are mixed.

Three forms are fitted and the one that best foretells runs left out, one at a time, is kept:

- exponential: L_i = c_i + exp(sum_j t_ij r_j), data mixing laws (arXiv:2403.16952, equation 1; its
  k_i is part of the exponent, as shares sum to 1);
- linear: L_i = sum_j b_ij r_j, the regression of RegMix (arXiv:2407.01492, section 3.2);
- logarithmic: L_i = b_i + sum_j b_ij log r_j, which falls ever more steeply as a share nears zero.

Invariant: the same runs give the same bits, intervals included.

    law = fit_mixing_law(shares, losses)        # [runs, sources], [runs, losses]
    law.predict(np.array([0.2, 0.5, 0.3]))      # [losses]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import DataError
from llmtrain.study.resample import resample
from llmtrain.study.solvers import least_squares

Array = NDArray[np.float64]

HUBER = 1e-2
"""Relative residual beyond which it counts linearly."""
_LEVELS = np.linspace(0.0, 0.98, 8)
"""Starts of the exponential form: its constant, as a share of the least loss."""
_FOLLOWED = 2
"""Starts that are followed to their end: those with the least squares."""
_SPARE = 2
"""Runs more than constants that a fit needs, so that one can be left out and residuals tell."""


class Form(Protocol):
    """A way to write one loss as a function of the shares."""

    def num_constants(self, num_sources: int) -> int:
        """Constants of one loss."""
        ...

    def fit(self, shares: Array, losses: Array) -> Array:
        """Fit [runs, sources] to [runs]; gives the constants."""
        ...

    def predict(self, constants: Array, shares: Array) -> Array:
        """Losses [...] of shares [..., sources]."""
        ...


class Exponential:
    """A constant plus an exponential of a sum over the shares."""

    def num_constants(self, num_sources: int) -> int:
        """See ``Form``."""
        return num_sources + 1

    def fit(self, shares: Array, losses: Array) -> Array:
        """See ``Form``; losses are near 1."""
        levels = _LEVELS * losses.min()
        starts = [np.array([c, *_solved(shares, np.log(losses - c))]) for c in levels]
        starts.sort(key=lambda x: float(np.square(self.predict(x, shares) - losses).sum()))
        found = [self._follow(start, shares, losses) for start in starts[:_FOLLOWED]]
        return min(found, key=lambda pair: pair[1])[0]

    def _follow(self, start: Array, shares: Array, losses: Array) -> tuple[Array, float]:
        def residuals(x: Array) -> Array:
            return self.predict(x, shares) - losses

        def slopes(x: Array) -> Array:
            grown = np.exp(shares @ x[1:])[:, None]
            return np.concatenate([np.ones_like(grown), grown * shares], axis=1)

        sources = shares.shape[1]
        low, high = [0.0] + [-40.0] * sources, [float(losses.min())] + [40.0] * sources
        return least_squares(residuals, start, slopes, (low, high), HUBER)

    def predict(self, constants: Array, shares: Array) -> Array:
        """See ``Form``."""
        value: Array = constants[0] + np.exp(shares @ constants[1:])
        return value


class Linear:
    """A sum over the shares."""

    def num_constants(self, num_sources: int) -> int:
        """See ``Form``."""
        return num_sources

    def fit(self, shares: Array, losses: Array) -> Array:
        """See ``Form``."""
        return _solved(shares, losses)

    def predict(self, constants: Array, shares: Array) -> Array:
        """See ``Form``."""
        value: Array = shares @ constants
        return value


class Logarithmic:
    """A constant plus a sum over the logs of the shares."""

    def num_constants(self, num_sources: int) -> int:
        """See ``Form``."""
        return num_sources + 1

    def fit(self, shares: Array, losses: Array) -> Array:
        """See ``Form``."""
        terms = np.concatenate([np.ones((len(shares), 1)), np.log(shares)], axis=1)
        return _solved(terms, losses)

    def predict(self, constants: Array, shares: Array) -> Array:
        """See ``Form``."""
        value: Array = constants[0] + np.log(shares) @ constants[1:]
        return value


FORMS: Mapping[str, Form] = {
    "exponential": Exponential(),
    "linear": Linear(),
    "logarithmic": Logarithmic(),
}
"""Forms by name."""


@dataclass(frozen=True, slots=True)
class MixingLaw:
    """The fit of all losses."""

    form: str
    """The form that was kept, in FORMS."""
    left_out: dict[str, float]
    """Form -> relative error of a run left out, root mean square."""
    constants: Array
    """Of every loss, [losses, constants]; losses in units of ``scale``."""
    scale: Array
    """Mean of every loss in nats, [losses]."""
    resampled: Array
    """Constants refitted to resampled runs, [resamples, losses, constants]."""
    noise: Array
    """Residuals of one more run in nats, [resamples, losses]."""

    def predict(self, shares: Array) -> Array:
        """Losses [..., losses] in nats at shares [..., sources]."""
        return self._losses(self.constants, shares)

    def resamples(self, shares: Array) -> Array:
        """What the refits say, [resamples, ..., losses]."""
        return np.stack([self._losses(constants, shares) for constants in self.resampled])

    def _losses(self, constants: Array, shares: Array) -> Array:
        form = FORMS[self.form]
        each = [form.predict(own, shares) for own in constants]
        return np.stack(each, axis=-1) * self.scale


def fit_mixing_law(
    shares: Array, losses: Array, num_resamples: int = 200, seed: int = 0
) -> MixingLaw:
    """Fit all losses by every form and keep the best one.

    Args:
        shares: of every run, rows sum to 1; [runs, sources].
        losses: held-out losses of every run in nats; [runs, losses].
        num_resamples: refits that intervals come from.
        seed: of the resampling.

    Raises:
        DataError: too few runs or mixtures that do not differ enough, numbers that are none.
    """
    _check(shares, losses)
    scale: Array = losses.mean(axis=0)
    scaled = losses / scale
    left_out = {name: _left_out_error(form, shares, scaled) for name, form in FORMS.items()}
    name = min(left_out, key=lambda form: left_out[form])
    form = FORMS[name]
    constants = np.stack([form.fit(shares, column) for column in scaled.T])
    refits, noise = [], []
    for own, column in zip(constants, scaled.T, strict=True):
        residuals = column - form.predict(own, shares)
        # one seed for all losses: a run's residuals stay together
        drawn = resample(lambda values: form.fit(shares, values), column, residuals, len(own),
                         num_resamples, seed)  # fmt: skip
        refits.append(drawn.constants)
        noise.append(drawn.noise)
    return MixingLaw(
        name, left_out, constants, scale, np.stack(refits, axis=1), np.stack(noise, axis=1) * scale
    )


def _solved(terms: Array, losses: Array) -> Array:
    return np.asarray(np.linalg.lstsq(terms, losses, rcond=None)[0], dtype=np.float64)


def _check(shares: Array, losses: Array) -> None:
    runs, sources = shares.shape
    least = max(form.num_constants(sources) for form in FORMS.values()) + _SPARE
    if sources < 2:
        raise DataError(
            f"a mixture of {sources} source has nothing to search; name at least 2 in data.sources"
        )
    if runs < least:
        raise DataError(
            f"the law over the shares of {sources} sources was to be fitted to {runs} runs; it "
            f"needs at least {least}, so raise num_mixtures"
        )
    if not (np.isfinite(losses).all() and (losses > 0).all()):
        raise DataError(
            "a run has a held-out loss that is no finite number above 0; leave the run out"
        )
    if not (shares > 0).all() or not np.allclose(shares.sum(axis=1), 1.0, atol=1e-6):
        raise DataError("a run has shares that are not above 0 or do not sum to 1; correct them")
    if np.linalg.matrix_rank(shares - shares.mean(axis=0), tol=1e-3) < sources - 1:
        raise DataError(
            f"the {runs} mixtures differ in fewer than {sources - 1} directions, so what each of "
            f"{sources} sources does cannot be told; lower concentration"
        )


def _left_out_error(form: Form, shares: Array, scaled: Array) -> float:
    """Relative error of the loss of a run from a fit to the others, root mean square."""
    errors = []
    for run in range(len(shares)):
        kept = np.arange(len(shares)) != run
        for column in scaled.T:
            constants = form.fit(shares[kept], column[kept])
            errors.append(float(form.predict(constants, shares[run])) / column[run] - 1.0)
    return float(np.sqrt(np.mean(np.square(errors))))
