"""The loss as a function of size and length: two published forms, the one that foretells better.

- additive: L(N, D) = E + A / N^alpha + B / D^beta (arXiv:2203.15556, equation 2);
- joint: L(N, D) = [(A / N)^(alpha / beta) + B / D]^beta (arXiv:2001.08361, equation 1.5), in which
  a small model gains less from more tokens, and a short run less from a larger model.

Fitted as in arXiv:2203.15556, section D.2: a Huber loss on residuals of the log loss, least over
many starts. For given exponents the other constants are linear, so a start is a pair of exponents
with the best other constants for them. The form with the least error on runs left out, one at a
time, is kept.

Invariant: the same runs give the same bits, intervals included.

    law = fit_scaling_law(parameters, tokens, losses)
    law.predict(3e6, 2e7)
    law.interval(3e6, 2e7)      # of what one more run would measure
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import DataError
from llmtrain.study.resample import Resampled, resample, span
from llmtrain.study.solvers import least_squares, nonnegative_least_squares

Array = NDArray[np.float64]
Bounds = tuple[Sequence[float], Sequence[float]]
"""Least and largest values."""

HUBER = 1e-2
"""Residual of the log loss beyond which it counts linearly.

arXiv:2203.15556 has 1e-3 for hundreds of runs; with a dozen that scatter by more, the fit would
pass through as many of them as it has constants.
"""

_STARTS = np.geomspace(0.05, 2.0, 10)
"""Exponents that starts are made of, for each of the two terms."""
_REFINED = 8
"""Starts that are followed to their end."""
_MIN_RUNS = 6
_MIN_VALUES = 3
_LEAST = -30.0
"""Log below which a term is nothing."""


class Form(Protocol):
    """A law in coordinates x around the mean size and length: n = log N / N_0, d = log D / D_0."""

    names: tuple[str, ...]
    """Its constants; the exponents come last."""
    bounds: Bounds
    """Of x."""

    def start(self, alpha: float, beta: float, n: Array, d: Array, losses: Array) -> Array:
        """Find the best x for given exponents."""
        ...

    def log_loss(self, x: Array, n: Array, d: Array) -> Array:
        """Log of the loss, [runs]."""
        ...

    def slopes(self, x: Array, n: Array, d: Array) -> Array:
        """Its derivatives, [runs, constants]."""
        ...

    def in_units(self, x: Array, size: float, length: float) -> Array:
        """Constants of the formula, given N_0 and D_0."""
        ...

    def loss(self, constants: Array, parameters: float, tokens: float) -> Array:
        """The formula."""
        ...


class Additive:
    """What no model learns, plus what its size and its length lack."""

    names: tuple[str, ...] = ("E", "A", "B", "alpha", "beta")
    bounds: Bounds = ([_LEAST] * 3 + [1e-3] * 2, [10.0] * 3 + [5.0] * 2)

    def start(self, alpha: float, beta: float, n: Array, d: Array, losses: Array) -> Array:
        """See ``Form``; x is log E, log A, log B, alpha, beta."""
        terms = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], axis=1)
        factors, _ = nonnegative_least_squares(terms / losses[:, None], np.ones_like(losses))
        return np.array([*_logs(factors), alpha, beta])

    def _terms(self, x: Array, n: Array, d: Array) -> Array:
        return np.stack([np.full_like(n, x[0]), x[1] - x[3] * n, x[2] - x[4] * d])

    def log_loss(self, x: Array, n: Array, d: Array) -> Array:
        """See ``Form``."""
        total: Array = np.logaddexp.reduce(self._terms(x, n, d), axis=0)
        return total

    def slopes(self, x: Array, n: Array, d: Array) -> Array:
        """See ``Form``."""
        shares = np.exp(self._terms(x, n, d) - self.log_loss(x, n, d))
        return np.stack([*shares, -n * shares[1], -d * shares[2]], axis=1)

    def in_units(self, x: Array, size: float, length: float) -> Array:
        """See ``Form``."""
        e, a, b, alpha, beta = x
        logs = [e, a + alpha * np.log(size), b + beta * np.log(length)]
        return np.array([*np.exp(logs), alpha, beta])

    def loss(self, constants: Array, parameters: float, tokens: float) -> Array:
        """See ``Form``."""
        e, a, b, alpha, beta = constants
        value: Array = e + a * parameters**-alpha + b * tokens**-beta
        return value


class Joint:
    """One power of the sum of both lacks."""

    names: tuple[str, ...] = ("A", "B", "alpha", "beta")
    bounds: Bounds = ([-100.0] * 2 + [1e-3] * 2, [100.0] * 2 + [5.0] * 2)

    def start(self, alpha: float, beta: float, n: Array, d: Array, losses: Array) -> Array:
        """See ``Form``; x is log A, log B, alpha, beta."""
        logs = np.log(losses) / beta
        terms = np.exp(np.stack([-alpha / beta * n, -d], axis=1) - logs[:, None])
        factors, _ = nonnegative_least_squares(terms, np.ones_like(losses))
        a, b = _logs(factors)
        return np.array([a * beta / alpha, b, alpha, beta])

    def log_loss(self, x: Array, n: Array, d: Array) -> Array:
        """See ``Form``."""
        a, b, alpha, beta = x
        value: Array = beta * np.logaddexp(alpha / beta * (a - n), b - d)
        return value

    def slopes(self, x: Array, n: Array, d: Array) -> Array:
        """See ``Form``."""
        a, b, alpha, beta = x
        of_size, total = alpha / beta * (a - n), self.log_loss(x, n, d) / beta
        share = np.exp(of_size - total)
        by_constant = [alpha * share, beta * np.exp(b - d - total)]
        return np.stack([*by_constant, share * (a - n), total - share * of_size], axis=1)

    def in_units(self, x: Array, size: float, length: float) -> Array:
        """See ``Form``."""
        return np.array([np.exp(x[0]) * size, np.exp(x[1]) * length, x[2], x[3]])

    def loss(self, constants: Array, parameters: float, tokens: float) -> Array:
        """See ``Form``."""
        a, b, alpha, beta = constants
        value: Array = ((a / parameters) ** (alpha / beta) + b / tokens) ** beta
        return value


FORMS: Mapping[str, Form] = {"additive": Additive(), "joint": Joint()}
"""Forms by name."""


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """The constants of a fit and, by resampling, how sure they are."""

    form: str
    """The form that was kept, in FORMS."""
    left_out: dict[str, float]
    """Form -> relative error of a run left out, root mean square."""
    constants: dict[str, float]
    """By name; losses in nats, sizes in parameters, lengths in tokens."""
    residuals: Array
    """Log of measured over fitted, of every run."""
    others: Resampled
    """Constants refitted to resampled runs, [num_resamples, constants]."""

    def predict(self, parameters: float, tokens: float) -> float:
        """Loss in nats of a model of ``parameters`` after ``tokens``."""
        constants = np.array([*self.constants.values()])
        return float(FORMS[self.form].loss(constants, parameters, tokens))

    def interval(
        self, parameters: float, tokens: float, confidence: float = 0.9
    ) -> tuple[float, float]:
        """Where one more run falls: the fit's own uncertainty and the scatter of runs."""
        predictions = FORMS[self.form].loss(self.others.constants.T, parameters, tokens)
        return span(predictions * np.exp(self.others.noise), confidence)

    def constant_interval(self, name: str, confidence: float = 0.9) -> tuple[float, float]:
        """Where a constant falls."""
        return span(self.others.constants[:, list(self.constants).index(name)], confidence)


def fit_scaling_law(
    parameters: Sequence[float],
    tokens: Sequence[float],
    losses: Sequence[float],
    num_resamples: int = 200,
    seed: int = 0,
) -> ScalingLaw:
    """Fit both forms to runs, keep the better one, and fit it again to resampled runs.

    Args:
        parameters: size N of every run.
        tokens: length D of every run.
        losses: held-out loss of every run, nats per token.
        num_resamples: refits that intervals come from.
        seed: of the resampling.

    Raises:
        DataError: too few runs, too few different sizes or lengths, losses that are none.
    """
    points = [np.asarray(values, dtype=np.float64) for values in (parameters, tokens, losses)]
    _check(*points)
    sizes, lengths, measured = points
    scale = float(np.exp(np.log(sizes).mean())), float(np.exp(np.log(lengths).mean()))
    n, d = np.log(sizes / scale[0]), np.log(lengths / scale[1])
    fits = {name: _fit(form, n, d, measured) for name, form in FORMS.items()}
    left_out = {name: _left_out_error(FORMS[name], x, n, d, measured) for name, x in fits.items()}
    name = min(left_out, key=lambda form: left_out[form])
    form, best = FORMS[name], fits[name]
    residuals = np.log(measured) - form.log_loss(best, n, d)

    def refit(log_losses: Array) -> Array:
        return form.in_units(_refine(form, best, n, d, np.exp(log_losses))[0], *scale)

    others = resample(refit, np.log(measured), residuals, len(best), num_resamples, seed)
    constants = dict(zip(form.names, form.in_units(best, *scale).tolist(), strict=True))
    return ScalingLaw(name, left_out, constants, residuals, others)


def _check(parameters: Array, tokens: Array, losses: Array) -> None:
    runs = len(losses)
    values = len(np.unique(parameters)), len(np.unique(tokens))
    if runs < _MIN_RUNS or min(values) < _MIN_VALUES:
        raise DataError(
            f"a law of the loss over size and length was to be fitted to {runs} runs of "
            f"{values[0]} sizes and {values[1]} lengths; it needs at least {_MIN_RUNS} runs of "
            f"{_MIN_VALUES} sizes and {_MIN_VALUES} lengths, so train more of them"
        )
    for name, array in (("parameters", parameters), ("tokens", tokens), ("loss", losses)):
        if not (np.isfinite(array).all() and (array > 0).all()):
            bad = array[~(np.isfinite(array) & (array > 0))][0]
            raise DataError(
                f"{name}={bad:g} of a run is no finite number above 0; leave the run out"
            )
    if np.ptp(losses) == 0:
        raise DataError(
            f"all {runs} runs have a loss of {losses[0]:g}: there is no law to fit; use sizes and "
            "lengths that make a difference"
        )


def _fit(form: Form, n: Array, d: Array, losses: Array) -> Array:
    """Follow the best starts to their end."""

    def squares(x: Array) -> float:
        return float(np.square(form.log_loss(x, n, d) - np.log(losses)).sum())

    pairs = [(float(alpha), float(beta)) for alpha in _STARTS for beta in _STARTS]
    starts = sorted((form.start(*pair, n, d, losses) for pair in pairs), key=squares)
    found = [_refine(form, start, n, d, losses) for start in starts[:_REFINED]]
    return min(found, key=lambda solution: solution[1])[0]


def _refine(form: Form, start: Array, n: Array, d: Array, losses: Array) -> tuple[Array, float]:
    """Follow a start to its end; gives its cost too."""
    return least_squares(
        lambda x: form.log_loss(x, n, d) - np.log(losses),
        start,
        lambda x: form.slopes(x, n, d),
        form.bounds,
        HUBER,
    )


def _left_out_error(form: Form, best: Array, n: Array, d: Array, losses: Array) -> float:
    """Relative error of the loss of a run from a fit to the others, root mean square."""
    errors = []
    for run in range(len(losses)):
        kept = np.arange(len(losses)) != run
        x, _ = _refine(form, best, n[kept], d[kept], losses[kept])
        errors.append(np.expm1(form.log_loss(x, n, d)[run] - np.log(losses[run])))
    return float(np.sqrt(np.mean(np.square(errors))))


def _logs(factors: Array) -> Array:
    """Logs of factors, those of nothing not below half of the least."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(factors), _LEAST / 2)
