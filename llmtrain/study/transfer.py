"""Width transfer: does the best learning rate stay when the model is widened, and by how much not.

The same rates are tried at every width with muP (model/mup.py) and without. The rate that the
narrowest tells is then used on a wide model that took no part, with rates around it to see whether
it was the best.

Invariant: every size has the same head_dim; what muP's scaling of the scores leaves out (see
model/mup.py) is then a constant.

    findings = width_transfer(config, trials.run)
"""

from collections.abc import Sequence

import numpy as np

from llmtrain.config.study import WidthTransferStudy, Words
from llmtrain.study.findings import Curve, Findings, Table
from llmtrain.study.grid import Bottom, parabola
from llmtrain.study.ladder import RunPoints
from llmtrain.study.measured import Measured, done, required

_AROUND = (0.5, 1.0, 2.0)
"""Rates of the wide model, times the predicted one."""


def width_transfer(config: WidthTransferStudy, run: RunPoints) -> Findings:
    """Train all widths both ways, transfer the narrowest one's rate, compare.

    Raises:
        DataError: a width has fewer than three rates with a loss.
    """
    ways = {"muP": str(config.base_width), "standard": "null"}
    keys = [(way, size) for way in ways for size in config.sizes]
    points = [
        [*size, f"model.mup_base_width={ways[way]}", f"optimizer.lr={rate:g}"]
        for way, size in keys
        for rate in config.learning_rates
    ]
    trials = run(points)
    per = len(config.learning_rates)
    runs = {key: done(trials[i * per : (i + 1) * per]) for i, key in enumerate(keys)}
    bottoms = {key: parabola([r.lr for r in own], [r.loss for r in own])
               for key, own in runs.items()}  # fmt: skip
    held_out = {way: _held_out(config, way, base, bottoms, run) for way, base in ways.items()}
    curves = [
        Curve(f"{way}, {_short(size)}", sorted((r.lr, r.loss) for r in own))
        for (way, size), own in runs.items()
    ]
    curves += [
        Curve(f"{way}, held out", sorted((r.lr, r.loss) for r in own))
        for way, own in held_out.items()
    ]
    return Findings(
        kind=config.kind,
        title=f"Width transfer: {sum(map(len, runs.values()))} runs, muP and standard",
        tables=[_widths_table(config, runs, bottoms), _held_out_table(config, bottoms, held_out)],
        sentences=_sentences(config, bottoms),
        curves=curves,
        x="learning rate",
    )


def _held_out(
    config: WidthTransferStudy,
    way: str,
    base: str,
    bottoms: dict[tuple[str, Words], Bottom],
    run: RunPoints,
) -> list[Measured]:
    """Train the wide model at the rate of the narrowest and around it."""
    rate = bottoms[way, config.sizes[0]].rate
    words = [*config.held_out, f"model.mup_base_width={base}"]
    trials = run([[*words, f"optimizer.lr={rate * times:.3g}"] for times in _AROUND])
    return [required(trial, f"a held-out run ({way})") for trial in trials]


def _widths_table(
    config: WidthTransferStudy,
    runs: dict[tuple[str, Words], list[Measured]],
    bottoms: dict[tuple[str, Words], Bottom],
) -> Table:
    rows = []
    for (way, size), own in runs.items():
        losses = {f"{r.lr:g}": f"{r.loss:.4f}" for r in own}
        cells = [losses.get(f"{rate:g}", "-") for rate in config.learning_rates]
        bottom = bottoms[way, size]
        rows.append([f"{way}, {_short(size)}", *cells, f"{bottom.rate:.3g}", f"{bottom.loss:.4f}"])
    rates = (f"lr {rate:g}" for rate in config.learning_rates)
    return Table("held-out loss", ["width", *rates, "best lr", "loss there"], rows)


def _held_out_table(
    config: WidthTransferStudy,
    bottoms: dict[tuple[str, Words], Bottom],
    held_out: dict[str, list[Measured]],
) -> Table:
    """The wide model's own best rate against the one of the narrowest."""
    rows = []
    for way, own in held_out.items():
        predicted = bottoms[way, config.sizes[0]].rate
        found = parabola([r.lr for r in own], [r.loss for r in own])
        where = f"{found.rate:.3g}" if found.inside else f"{_beyond(found, predicted)}"
        at = next(r.loss for r in own if np.isclose(r.lr, predicted, rtol=0.01))
        best = min(found.loss, at)
        rows.append([
            f"{way}, {_short(config.held_out)}", f"{predicted:.3g}", where,
            f"{100 * (predicted / found.rate - 1):+.0f} %", f"{at:.4f}", f"{best:.4f}",
            f"{100 * (at / best - 1):+.2f} %",
        ])  # fmt: skip
    head = ["held-out width", "predicted lr", "measured best lr", "error", "loss at predicted",
            "least loss", "lost"]  # fmt: skip
    return Table("predicted against measured", head, rows)


def _beyond(found: Bottom, predicted: float) -> str:
    return f"{'at most' if found.rate < predicted else 'at least'} {found.rate:.3g}"


def _sentences(config: WidthTransferStudy, bottoms: dict[tuple[str, Words], Bottom]) -> list[str]:
    first, last = config.sizes[0], config.sizes[-1]
    found = []
    for way in dict.fromkeys(way for way, _ in bottoms):
        moved = bottoms[way, last].rate / bottoms[way, first].rate
        found.append(
            f"{way}: from {_short(first)} to {_short(last)} the best rate changes by a factor of "
            f"{moved:.2f}."
        )
    if not all(bottom.inside for bottom in bottoms.values()):
        found.append("A best rate at an end of the grid stands for one beyond it; widen the grid.")
    return found


def _short(size: Sequence[str]) -> str:
    """The width among the words of a size."""
    widths = [word.partition("=")[2] for word in size if word.startswith("model.hidden_size=")]
    return widths[0] if widths else " ".join(size)
