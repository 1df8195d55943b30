"""The solvers that fits use, from scipy, which is an extra.

Invariant: scipy is imported by a call alone, so that nothing but a study needs it.

    solution, cost = least_squares(residuals, start, slopes, ([-30.0], [10.0]), huber=1e-3)
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.errors import ConfigError

Array = NDArray[np.float64]


def least_squares(
    residuals: Callable[[Array], Array],
    start: Array,
    slopes: Callable[[Array], Array],
    bounds: tuple[Sequence[float], Sequence[float]],
    huber: float,
) -> tuple[Array, float]:
    """Bring residuals to the least Huber loss within bounds; gives the solution and its cost.

    Raises:
        ConfigError: scipy is not installed.
    """
    low, high = (np.asarray(bound, dtype=np.float64) for bound in bounds)
    inside = np.clip(start, low + 1e-9, high - 1e-9)
    found = _scipy("optimize").least_squares(
        residuals, inside, jac=slopes, bounds=(low, high), loss="huber", f_scale=huber,
        xtol=1e-10, ftol=1e-12, gtol=1e-12, max_nfev=500,
    )  # fmt: skip
    return np.asarray(found.x), float(found.cost)


def nonnegative_least_squares(matrix: Array, target: Array) -> tuple[Array, float]:
    """Solve for factors of at least 0; gives them and the norm of what is left."""
    values, rest = _scipy("optimize").nnls(matrix, target)
    return np.asarray(values), float(rest)


def minimize_on_simplex(
    objective: Callable[[Array], float], start: Array, bounds: Sequence[tuple[float, float]]
) -> Array:
    """Find the shares, which sum to 1 and keep to ``bounds``, near ``start`` of least objective."""
    found = _scipy("optimize").minimize(
        objective, start, method="SLSQP", bounds=bounds,
        constraints={"type": "eq", "fun": lambda shares: shares.sum() - 1.0},
        options={"ftol": 1e-10, "maxiter": 200},
    )  # fmt: skip
    shares = np.clip(found.x, *np.transpose(bounds))
    return np.asarray(shares / shares.sum())


def _scipy(part: str) -> Any:
    try:
        return import_module(f"scipy.{part}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a study's fit needs the package {error.name}, which is not installed; "
            "run pip install 'llmtrain[sweep]'"
        ) from error
