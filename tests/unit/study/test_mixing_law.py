"""The fit over shares: the form that made the losses is found, and so are the best shares."""

import numpy as np
import pytest
from numpy.typing import NDArray

from llmtrain.config.study import MixtureSearchStudy
from llmtrain.errors import ConfigError, DataError
from llmtrain.study.mixing_law import FORMS, fit_mixing_law
from llmtrain.study.mixture_search import best_shares, draw_mixtures

Array = NDArray[np.float64]

NATURAL = np.array([0.6, 0.3, 0.1])
SLOPES = np.array([[0.2, 1.4, 1.1], [1.0, -0.6, 0.9], [1.2, 0.8, -1.5]])
"""Of the exponents of three losses, [losses, sources]."""


def mixtures(number: int = 12) -> Array:
    config = MixtureSearchStudy(num_mixtures=number)
    return np.array(draw_mixtures(NATURAL, config)) / 1000


def losses(form: str, shares: Array, spread: float = 0.0) -> Array:
    noise = np.random.default_rng(5).normal(0.0, spread, (*shares.shape[:-1], 3))
    each = {
        "exponential": 2.0 + np.exp(shares @ SLOPES.T),
        "linear": shares @ (4.0 + SLOPES.T),
        "logarithmic": 3.0 + np.log(shares) @ (-0.1 * (2.0 - SLOPES.T)),
    }[form]
    return np.asarray(each * (1.0 + noise))


@pytest.mark.parametrize("form", list(FORMS))
def test_the_form_of_the_losses_is_kept_and_foretells_others(form: str) -> None:
    tried, spread = mixtures(), 0.002
    law = fit_mixing_law(tried, losses(form, tried, spread), num_resamples=16)
    assert law.form == form
    assert law.left_out[form] < 0.005
    other = np.array([0.3, 0.3, 0.4])
    assert law.predict(other) == pytest.approx(losses(form, other), rel=0.01)
    outcomes = law.resamples(other) + law.noise
    low, high = outcomes.min(axis=0), outcomes.max(axis=0)
    assert (low <= losses(form, other)).all()
    assert (losses(form, other) <= high).all()


def test_best_shares_are_those_of_the_least_loss_within_what_was_tried() -> None:
    tried, weights = mixtures(), np.array([0.2, 0.5, 0.3])
    law = fit_mixing_law(tried, losses("exponential", tried), num_resamples=1)
    best = best_shares(law, weights, tried)
    assert best.sum() == pytest.approx(1.0)
    assert (best >= tried.min(0) - 1e-6).all()
    assert (best <= tried.max(0) + 1e-6).all()
    grid = np.random.default_rng(0).dirichlet(np.ones(3), 20_000)
    grid = grid[((grid >= tried.min(0)) & (grid <= tried.max(0))).all(1)]
    least = (losses("exponential", grid) @ weights).min()
    assert losses("exponential", best) @ weights <= least + 1e-3
    assert not np.allclose(best, NATURAL, atol=0.1)


def test_mixtures_are_around_the_natural_shares_and_not_alike() -> None:
    config = MixtureSearchStudy(num_mixtures=40, min_share=0.02)
    drawn = draw_mixtures(NATURAL, config)
    assert drawn == draw_mixtures(NATURAL, config)
    shares = np.array(drawn) / 1000
    assert (shares.sum(1) == 1.0).all()
    assert shares.min() >= 0.02
    assert list(shares.mean(0).argsort()) == [2, 1, 0]
    distances = np.linalg.norm(shares[:, None] - shares[None], axis=-1) + np.eye(40)
    assert distances.min() > 0.02


def test_a_least_share_that_few_mixtures_meet_is_refused() -> None:
    config = MixtureSearchStudy(min_share=0.33, concentration=50.0)
    with pytest.raises(ConfigError, match=r"min_share=0.33 is met by \d+ of 100000 mixtures"):
        draw_mixtures(NATURAL, config)


def test_what_cannot_be_fitted_is_refused() -> None:
    tried = mixtures()
    good = losses("linear", tried)
    with pytest.raises(DataError, match="fitted to 5 runs; it needs at least 6"):
        fit_mixing_law(tried[:5], good[:5])
    with pytest.raises(DataError, match="differ in fewer than 2 directions"):
        fit_mixing_law(np.tile(NATURAL, (12, 1)), good)
    with pytest.raises(DataError, match="a mixture of 1 source has nothing to search"):
        fit_mixing_law(np.ones((12, 1)), good)
    with pytest.raises(DataError, match="no finite number above 0"):
        fit_mixing_law(tried, np.where(good == good.max(), np.inf, good))
    with pytest.raises(DataError, match="do not sum to 1"):
        fit_mixing_law(tried * 2, good)
