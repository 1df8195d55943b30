"""The mixture search: small runs on random shares, the law of their losses, the best shares by it.

Invariant: shares are whole thousandths, so a run's folder names what it trained on; the best are
looked for between the least and the largest share that was tried of each source, where the law was
fitted.

    findings = mixture_search(config, trials.run, {"web": "stores/web", "code": "stores/code"})
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.study import MixtureSearchStudy
from llmtrain.data.store import open_sources
from llmtrain.errors import ConfigError, DataError
from llmtrain.study.findings import Curve, Findings, Table, count, error, interval
from llmtrain.study.ladder import RunPoints
from llmtrain.study.measured import Measured, done, required
from llmtrain.study.mixing_law import MixingLaw, fit_mixing_law
from llmtrain.study.resample import span
from llmtrain.study.solvers import minimize_on_simplex
from llmtrain.sweep.record import named

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]

_PARTS = 1000
"""Shares are whole numbers of these."""
_CANDIDATES = 64
"""Random mixtures that each new one is chosen from: the one farthest from those before it."""
_GRID = 4000
"""Random mixtures among which refits look for their best."""
_DRAWS = 100_000


def mixture_search(
    config: MixtureSearchStudy, run: RunPoints, sources: Mapping[str, str | tuple[str, ...]]
) -> Findings:
    """Train random mixtures, fit the law, train at its best shares and at the natural ones.

    Raises:
        ConfigError: fewer than two sources, or an objective that names others.
        DataError: the trials are too few for the law, or a held-out run has no loss.
    """
    names, natural = _natural(sources)
    design = draw_mixtures(natural, config)
    runs = done(run([_words(names, shares) for shares in design]))
    if not runs:
        raise DataError("no trial of the study has a loss; their folders' logs say why")
    judged = _judged(runs, config)
    shares = np.array([_shares(r, names) for r in runs])
    losses = np.array([[r.sources[name] for name in judged] for r in runs])
    law = fit_mixing_law(shares, losses, config.num_resamples, config.seed)
    weights = _weights(config, judged)
    best = best_shares(law, weights, shares)
    logger.info("the law is fitted (%s); training the held-out mixtures", law.form)
    mixtures = {"predicted best": _rounded(best), "natural": _rounded(natural)}
    held_out = _held_out(config, run, names, mixtures)
    objective = losses @ weights
    return Findings(
        kind=config.kind,
        title=f"Mixture search: {len(runs)} runs on random shares of {len(names)} sources",
        tables=[
            _runs_table(runs, names, judged, shares, losses, objective),
            _forms_table(law),
            _shares_table(law, names, weights, shares, mixtures, config.confidence),
            _held_out_table(law, judged, weights, mixtures, held_out, config.confidence),
        ],
        sentences=_sentences(law, judged, weights, mixtures, held_out, objective),
        curves=_curves(law, names, judged, shares, losses, mixtures["predicted best"]),
        x="share of the source in training",
        log=False,
    )


def _natural(sources: Mapping[str, str | tuple[str, ...]]) -> tuple[list[str], Array]:
    """Names of the sources and their shares of all tokens."""
    if len(sources) < 2:
        raise ConfigError(
            f"a mixture search needs at least 2 sources, data.sources names {len(sources)}"
        )
    tokens = {name: store.num_tokens for name, store in open_sources(sources, check=False).items()}
    shares = np.array([tokens[name] for name in sources], dtype=np.float64)
    return list(sources), shares / shares.sum()


def draw_mixtures(natural: Array, config: MixtureSearchStudy) -> list[list[int]]:
    """Draw mixtures, in thousandths, from a Dirichlet distribution with the natural mean.

    Each is the one of several draws that is farthest from all before it, so that few fill the room.

    Raises:
        ConfigError: ``min_share`` leaves no room.
    """
    random = np.random.default_rng(config.seed)
    drawn = random.dirichlet(config.concentration * natural, size=_DRAWS)
    drawn = drawn[(drawn >= config.min_share).all(axis=1)]
    need = config.num_mixtures * _CANDIDATES
    if len(drawn) < need:
        raise ConfigError(
            f"min_share={config.min_share} is met by {len(drawn)} of {_DRAWS} mixtures drawn with "
            f"concentration={config.concentration}, needed are {need}; lower min_share"
        )
    pools = drawn[:need].reshape(config.num_mixtures, _CANDIDATES, -1)
    chosen = [pools[0][0]]
    for pool in pools[1:]:
        distances = np.linalg.norm(pool[:, None] - np.array(chosen)[None], axis=-1).min(axis=1)
        chosen.append(pool[int(distances.argmax())])
    return [_rounded(shares) for shares in chosen]


def best_shares(law: MixingLaw, weights: Array, tried: Array) -> Array:
    """Find the shares of the least weighted loss, within what was tried of each source."""
    bounds = [(float(low), float(high)) for low, high in zip(tried.min(0), tried.max(0))]  # noqa: B905

    def objective(shares: Array) -> float:
        return float(law.predict(shares) @ weights)

    starts = tried[np.argsort(law.predict(tried) @ weights)[:3]]
    found = [minimize_on_simplex(objective, start, bounds) for start in starts]
    return min([*found, *starts], key=objective)


def _rounded(shares: Array) -> list[int]:
    """Shares in whole thousandths, each at least one, that sum to a thousand."""
    whole = np.maximum(1, np.floor(shares * _PARTS)).astype(int)
    rest = shares * _PARTS - whole
    for place in np.argsort(-rest)[: max(0, _PARTS - int(whole.sum()))]:
        whole[place] += 1
    whole[int(whole.argmax())] += _PARTS - int(whole.sum())
    return [int(part) for part in whole]


def _words(names: Sequence[str], parts: Sequence[int]) -> list[str]:
    return [f"mixture.weights.{name}={part}" for name, part in zip(names, parts, strict=True)]


def _shares(run: Measured, names: Sequence[str]) -> list[float]:
    values = named(run.overrides)
    return [values[f"mixture.weights.{name}"] / _PARTS for name in names]


def _judged(runs: Sequence[Measured], config: MixtureSearchStudy) -> list[str]:
    """Sources whose held-out loss counts, by name.

    Raises:
        ConfigError: the runs do not evaluate, or not all that the objective names.
    """
    found = list(runs[0].sources)
    unknown = [name for name in config.objective or {} if name not in found]
    if not found or unknown:
        what = f"the objective names {', '.join(unknown)}, " if unknown else ""
        raise ConfigError(
            f"{what}held-out losses are of {', '.join(found) or 'no source'}; set data.validation "
            "for every source that counts, and evaluation.every_steps"
        )
    return found


def _weights(config: MixtureSearchStudy, judged: Sequence[str]) -> Array:
    given = config.objective or dict.fromkeys(judged, 1.0)
    weights = np.array([given.get(name, 0.0) for name in judged])
    normal: Array = weights / weights.sum()
    return normal


def _held_out(
    config: MixtureSearchStudy,
    run: RunPoints,
    names: Sequence[str],
    mixtures: Mapping[str, Sequence[int]],
) -> dict[str, list[Measured]]:
    """Train every held-out mixture with several seeds."""
    seeds = [[], *([f"training.seed={1000 + i}"] for i in range(config.repeats))]
    points = [[*_words(names, parts), *seed] for parts in mixtures.values() for seed in seeds]
    trials = [required(trial, "a held-out run") for trial in run(points)]
    per = len(seeds)
    return {name: trials[i * per : (i + 1) * per] for i, name in enumerate(mixtures)}


def _runs_table(
    runs: Sequence[Measured],
    names: Sequence[str],
    judged: Sequence[str],
    shares: Array,
    losses: Array,
    objective: Array,
) -> Table:
    rows = [
        [runs[i].folder, *(f"{x:.3f}" for x in shares[i]), *(f"{x:.4f}" for x in losses[i]),
         f"{objective[i]:.4f}"]
        for i in np.argsort(objective)
    ]  # fmt: skip
    head = ["run", *names, *(f"loss {name}" for name in judged), "objective"]
    return Table(f"runs of {count(runs[0].parameters)} parameters, {count(runs[0].tokens)} tokens",
                 head, rows)  # fmt: skip


def _forms_table(law: MixingLaw) -> Table:
    rows = [
        [name, f"{100 * off:.2f} %", "kept" if name == law.form else ""]
        for name, off in sorted(law.left_out.items(), key=lambda pair: pair[1])
    ]
    return Table("error of a run left out, root mean square", ["form", "error", ""], rows)


def _shares_table(
    law: MixingLaw,
    names: Sequence[str],
    weights: Array,
    tried: Array,
    mixtures: Mapping[str, Sequence[int]],
    confidence: float,
) -> Table:
    random = np.random.default_rng(0)
    grid = random.dirichlet(np.ones(len(names)), size=_GRID)
    grid = grid[((grid >= tried.min(0)) & (grid <= tried.max(0))).all(axis=1)]
    least = grid[(law.resamples(grid) @ weights).argmin(axis=1)]
    rows = [
        [name, *(f"{parts[i] / _PARTS:.3f}" for parts in mixtures.values()),
         interval(span(least[:, i], confidence)),
         interval((float(tried[:, i].min()), float(tried[:, i].max())))]
        for i, name in enumerate(names)
    ]  # fmt: skip
    head = ["source", *mixtures, f"{confidence:.0%} interval of the best", "tried"]
    return Table("shares", head, rows)


def _held_out_table(
    law: MixingLaw,
    judged: Sequence[str],
    weights: Array,
    mixtures: Mapping[str, Sequence[int]],
    held_out: Mapping[str, Sequence[Measured]],
    confidence: float,
) -> Table:
    rows = []
    for name, parts in mixtures.items():
        shares = np.array(parts) / _PARTS
        predicted, others = law.predict(shares), law.resamples(shares) + law.noise
        measured = _mean(held_out[name], judged)
        columns = [*np.eye(len(judged)), weights]
        for label, pick in zip([*judged, "objective"], columns, strict=True):
            low, high = span(others @ pick, confidence)
            got, want = float(measured @ pick), float(predicted @ pick)
            rows.append([
                f"{name}, {label}", f"{want:.4f}", interval((low, high), 4), f"{got:.4f}",
                error(want, got), "yes" if low <= got <= high else "no",
            ])  # fmt: skip
    head = ["held-out loss", "predicted", f"{confidence:.0%} interval", "measured", "error",
            "inside"]  # fmt: skip
    return Table("predicted against measured", head, rows)


def _mean(runs: Sequence[Measured], judged: Sequence[str]) -> Array:
    mean: Array = np.mean([[r.sources[name] for name in judged] for r in runs], axis=0)
    return mean


def _sentences(
    law: MixingLaw,
    judged: Sequence[str],
    weights: Array,
    mixtures: Mapping[str, Sequence[int]],
    held_out: Mapping[str, Sequence[Measured]],
    objective: Array,
) -> list[str]:
    wanted = {name: float(law.predict(np.array(parts) / _PARTS) @ weights)
              for name, parts in mixtures.items()}  # fmt: skip
    got = {name: float(_mean(runs, judged) @ weights) for name, runs in held_out.items()}
    best, natural = list(mixtures)
    found = [
        f"The best shares were to lower the objective by {wanted[natural] - wanted[best]:.4f} nats "
        f"against the natural ones; they lower it by {got[natural] - got[best]:.4f}. The best of "
        f"the random mixtures has {objective.min():.4f}."
    ]
    single = {
        name: [float(_mean([r], judged) @ weights) for r in runs] for name, runs in held_out.items()
    }
    if all(len(values) > 1 for values in single.values()):
        spread = np.sqrt(np.mean([np.var(values, ddof=1) for values in single.values()]))
        found.append(
            f"Measured is the mean over {len(single[best])} seeds; the objective of single runs "
            f"scatters by {100 * spread / got[best]:.2f} % (standard deviation)."
        )
    return found


def _curves(
    law: MixingLaw,
    names: Sequence[str],
    judged: Sequence[str],
    shares: Array,
    losses: Array,
    best: Sequence[int],
) -> list[Curve]:
    """Every source's loss over its own share: runs, and the law, the others as in ``best``."""
    curves, centre = [], np.array(best) / _PARTS
    for place, name in enumerate(judged):
        if name not in names:
            continue
        own = names.index(name)
        line = np.linspace(shares[:, own].min(), shares[:, own].max(), 24)
        others = centre * (np.arange(len(names)) != own)
        mixed = line[:, None] * np.eye(len(names))[own]
        mixed = mixed + (1 - line)[:, None] * others / others.sum()
        fitted = law.predict(mixed)[:, place]
        runs = sorted(zip(shares[:, own].tolist(), losses[:, place].tolist(), strict=True))
        curves.append(Curve(f"{name}, measured", runs))
        curves.append(
            Curve(f"{name}, fitted", list(zip(line.tolist(), fitted.tolist(), strict=True)))
        )
    return curves
