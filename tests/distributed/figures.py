"""How far a layout is from one process: the figures of the parity suite and their tolerances.

suite = Suite({"native": ranks, "deepspeed": deepspeed_ranks})
figures = suite.measure(LAYOUTS["pp2 zbv"])
assert not figures.beyond()
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from llmtrain.parity import compare_gradients
from tests.distributed.layouts import Layout
from tests.distributed.rig import REASONS, Numbers, Outcome, exercise, relative
from tests.world import RankPool

TIME_LIMIT_S = 240.0


@dataclass(frozen=True)
class Tolerance:
    """Largest errors that pass."""

    gradient: float
    """Of the first loss and of every gradient."""
    curve: float
    """Of losses over the steps, of the evaluation, of a source's losses."""
    norm: float
    """Of gradient norms over the steps."""


TOLERANCES = {
    "fp32": Tolerance(gradient=5e-6, curve=1e-6, norm=5e-6),
    "fp64": Tolerance(gradient=1e-12, curve=1e-12, norm=1e-12),
    # Rounding to 8 bits differs with the order of sums, so only the curve is held to a bound.
    "bf16": Tolerance(gradient=math.inf, curve=1e-5, norm=math.inf),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Worst relative errors of a layout, and what must be exact."""

    precision: str
    loss: float
    """Of the first step."""
    gradient: float
    """Of any parameter in the first step."""
    parameter: str
    """Whose."""
    fp64: float
    """Of the first loss and any gradient in fp64; 0 where the engine has no fp64."""
    curve: float
    """Of any loss of the steps and of one after a refused step, of evaluation and of a source."""
    norm: float
    """Of any gradient norm."""
    start: bool
    """Whether start values are the same bits."""
    refused: bool
    """Whether the step to be refused was, and changed no bit."""
    agreed: bool
    """Whether all ranks report the same bits."""

    def beyond(self) -> list[str]:
        """What is out of tolerance."""
        allowed = TOLERANCES[self.precision]
        limits = {
            "loss": allowed.gradient,
            "gradient": allowed.gradient,
            "fp64": TOLERANCES["fp64"].gradient,
            "curve": allowed.curve,
            "norm": allowed.norm,
        }
        found = [f"{name}={getattr(self, name):.2e}" for name in limits
                 if not getattr(self, name) <= limits[name]]  # fmt: skip
        found += [f.name for f in fields(self) if getattr(self, f.name) is False]
        return [*found, f"worst gradient: {self.parameter}"] if found else []


class Suite:
    """Runs layouts on live ranks and compares them with one process, which runs once per kind."""

    def __init__(self, pools: Mapping[str, RankPool]) -> None:
        """Pools of ranks by engine."""
        self._pools = pools
        self._references: dict[str, Outcome] = {}

    def reference(self, layout: Layout) -> Outcome:
        """What one process computes."""
        alone = layout.reference
        if alone.name not in self._references:
            (outcome,) = self._pools["native"].run(exercise, alone.config, size=1)
            self._references[alone.name] = outcome
        return self._references[alone.name]

    def measure(self, layout: Layout, num_steps: int | None = None) -> Figures:
        """Run ``layout`` and compare its losses, all or those of the first ``num_steps``."""
        want = self.reference(layout)
        reason = REASONS[sum(layout.name.encode()) % len(REASONS)]
        pool = self._pools[layout.engine.kind]
        steps = num_steps or layout.steps
        outcomes: list[Outcome] = pool.run(
            exercise, layout.config, reason, steps, size=layout.size, timeout_s=TIME_LIMIT_S
        )
        return _compare(outcomes, want, layout.engine.precision)


def _compare(outcomes: list[Outcome], want: Outcome, precision: str) -> Figures:
    got = outcomes[0]
    steps = len(got.losses)
    loss, gradient, parameter = _first_step(got.first, want.first)
    exact = _first_step(got.fp64, want.fp64)[:2] if got.fp64 and want.fp64 else (0.0,)
    curves = (
        (got.losses, want.losses[:steps]),
        (got.source_losses, want.source_losses[:steps]),
        ([got.held_out], [want.held_out]),
    )
    return Figures(
        precision=precision,
        loss=loss,
        gradient=gradient,
        parameter=parameter,
        fp64=max(exact),
        curve=max(relative(*pair) for pair in curves),
        norm=relative(got.grad_norms, want.grad_norms[:steps]),
        start=got.start == want.start,
        refused=all(outcome.refused for outcome in outcomes),
        agreed=all(outcome == got for outcome in outcomes),
    )


def _first_step(got: Numbers, want: Numbers) -> tuple[float, float, str]:
    """Error of the loss, the worst of a gradient, and its parameter."""
    worst = max(
        compare_gradients(got.gradients, want.gradients, step=1),
        key=lambda d: math.inf if math.isnan(d.error) else d.error,
    )
    return relative([got.loss], [want.loss]), worst.error, worst.name
