"""The scaling ladder: sizes times lengths, their law, and a bigger run that checks it.

Invariant: the held-out run starts after the law is fitted, and nothing of it goes into the fit.

    findings = scaling_ladder(config, trials.run)
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from llmtrain.config.study import ScalingLadderStudy
from llmtrain.study.findings import Curve, Findings, Table, count, error, interval
from llmtrain.study.measured import Measured, done, required
from llmtrain.study.scaling_law import ScalingLaw, fit_scaling_law
from llmtrain.sweep.record import Trial

logger = logging.getLogger(__name__)

RunPoints = Callable[[Sequence[Sequence[str]]], list[Trial]]
"""Runs points to their end."""

_FORMULAS = {
    "additive": "L(N, D) = E + A / N^alpha + B / D^beta",
    "joint": "L(N, D) = [(A / N)^(alpha / beta) + B / D]^beta",
}
_CURVE_POINTS = 24


def scaling_ladder(config: ScalingLadderStudy, run: RunPoints) -> Findings:
    """Train the ladder, fit the law, foretell the held-out run, train it, compare.

    Raises:
        DataError: the trials are too few for the law, or the held-out run has no loss.
    """
    points = [[*size, f"training.num_tokens={n}"] for size in config.sizes for n in config.tokens]
    again = [[*points[0], f"training.seed={1000 + i}"] for i in range(config.repeats)]
    trials = run([*points, *again])
    runs, repeats = done(trials[: len(points)]), done([trials[0], *trials[len(points) :]])
    law = fit_scaling_law(
        [r.parameters for r in runs], [r.tokens for r in runs], [r.loss for r in runs],
        num_resamples=config.num_resamples,
    )  # fmt: skip
    logger.info("the law is fitted; training the held-out run")
    (trial,) = run([[*config.held_out, f"training.num_tokens={config.held_out_tokens}"]])
    held_out = required(trial, "the held-out run")
    return Findings(
        kind=config.kind,
        title=f"Scaling ladder: {len(runs)} runs, {_FORMULAS[law.form]}",
        tables=[
            _runs_table(law, runs),
            _forms_table(law),
            _constants_table(law, config.confidence),
            _held_out_table(law, held_out, config.confidence),
        ],
        sentences=_sentences(law, runs, repeats, held_out, config.confidence),
        curves=_curves(law, runs, held_out),
        x="training tokens D",
    )


def _runs_table(law: ScalingLaw, runs: Sequence[Measured]) -> Table:
    rows = []
    for r in sorted(runs, key=lambda r: (r.parameters, r.tokens)):
        fitted = law.predict(r.parameters, r.tokens)
        size, length = count(r.parameters), count(r.tokens)
        rows.append(
            [r.folder, size, length, f"{r.loss:.4f}", f"{fitted:.4f}", error(fitted, r.loss)]
        )
    return Table("runs", ["run", "N", "D", "measured", "fitted", "error"], rows)


def _forms_table(law: ScalingLaw) -> Table:
    rows = [
        [f"{name}: {_FORMULAS[name]}", f"{100 * off:.2f} %", "kept" if name == law.form else ""]
        for name, off in sorted(law.left_out.items(), key=lambda pair: pair[1])
    ]
    return Table("error of a run left out, root mean square", ["form", "error", ""], rows)


def _constants_table(law: ScalingLaw, confidence: float) -> Table:
    rows = []
    for name in law.constants:
        low, high = law.constant_interval(name, confidence)
        rows.append([name, f"{law.constants[name]:.4g}", f"{low:.4g} to {high:.4g}"])
    return Table("constants", ["constant", "value", f"{confidence:.0%} interval"], rows)


def _held_out_table(law: ScalingLaw, held_out: Measured, confidence: float) -> Table:
    place = held_out.parameters, held_out.tokens
    predicted, span = law.predict(*place), law.interval(*place, confidence)
    head = ["held-out run", "N", "D", "predicted", f"{confidence:.0%} interval", "measured",
            "error", "inside"]  # fmt: skip
    row = [
        held_out.folder, count(place[0]), count(place[1]), f"{predicted:.4f}", interval(span, 4),
        f"{held_out.loss:.4f}", error(predicted, held_out.loss),
        "yes" if span[0] <= held_out.loss <= span[1] else "no",
    ]  # fmt: skip
    return Table("predicted against measured", head, [row])


def _sentences(
    law: ScalingLaw,
    runs: Sequence[Measured],
    repeats: Sequence[Measured],
    held_out: Measured,
    confidence: float,
) -> list[str]:
    compute = [r.parameters * r.tokens for r in runs]
    times = held_out.parameters * held_out.tokens / max(compute)
    scatter = 100 * float(np.sqrt(np.mean(law.residuals**2)))
    found = [
        f"The fit misses its own runs by {scatter:.2f} % (root mean square); the held-out run has "
        f"{times:.1f} times the compute of the largest of them."
    ]
    if len(repeats) > 2:
        losses = np.array([r.loss for r in repeats])
        spread = 100 * float(losses.std(ddof=1) / losses.mean())
        found.append(
            f"{len(losses)} seeds of the first run scatter by {spread:.2f} % (standard deviation): "
            "a prediction nearer than that is luck."
        )
    a, b = law.constants["alpha"], law.constants["beta"]
    share = b / (a + b)
    found.append(
        f"Best use of more compute C = 6 N D by this law: N grows with C^{share:.2f}, D with "
        f"C^{1 - share:.2f}."
    )
    return found


def _curves(law: ScalingLaw, runs: Sequence[Measured], held_out: Measured) -> list[Curve]:
    """Measured losses of every size over length, and the law's line through them."""
    curves = []
    for size in sorted({r.parameters for r in (*runs, held_out)}):
        name = f"N = {count(size)}"
        mine = sorted((r.tokens, r.loss) for r in runs if r.parameters == size)
        lengths = [r.tokens for r in (*runs, held_out)]
        line = np.geomspace(min(lengths), max(lengths), _CURVE_POINTS)
        if mine:
            curves.append(Curve(f"{name}, measured", mine))
        curves.append(Curve(f"{name}, fitted", [(float(d), law.predict(size, d)) for d in line]))
    curves.append(Curve("held out, measured", [(held_out.tokens, held_out.loss)]))
    return curves
