"""When loss or gradient norm spike: the last values of both, their median, and how far they spread.

A value spikes where it lies more than a number of deviations above the median of the window. The
deviation is 1.4826 times the median distance from the median, which one spike does not move, and at
least 1 % of the median, so that a flat curve does not make noise a spike.

Invariant: the values stay on the device and no call but ``to_plain`` and ``load`` makes the host
wait; the window is a function of the steps alone, not of when anybody looks at it.

    window = SpikeWindow(device, size=50)
    window.add(values, keep=result.applied)             # [loss, gradient norm]
    window.middle + zscore * window.deviation           # the largest that is no spike
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

WATCHED = ("loss", "grad_norm")
"""What may spike, in the order of the values of a step."""
FEWEST_STEPS = 10
_DEVIATIONS = 1.4826
_SMALLEST = 0.01


class SpikeWindow:
    """The last kept values of a run, oldest first."""

    def __init__(self, device: torch.device, size: int) -> None:
        """Begin empty; ``size`` steps are kept."""
        self._values = torch.full(
            (len(WATCHED), size), torch.nan, dtype=torch.float64, device=device
        )
        self.middle: Tensor
        """Median of each, float64 [2]; 0 while there are too few steps."""
        self.deviation: Tensor
        """Robust standard deviation of each, float64 [2]; inf while there are too few steps."""
        self._measure()

    def add(self, values: Tensor, keep: Tensor) -> None:
        """Take the float64 ``values`` [2] of a step where ``keep`` and where both are finite."""
        moved = torch.cat([self._values[:, 1:], values[:, None]], dim=1)
        self._values = torch.where(keep & torch.isfinite(values).all(), moved, self._values)
        self._measure()

    def to_plain(self) -> dict[str, list[float]]:
        """Return the window as JSON can hold it; waits for the device."""
        rows = self._values.tolist()
        kept = ([value for value in row if value == value] for row in rows)
        return dict(zip(WATCHED, kept, strict=True))

    def load(self, plain: Mapping[str, Sequence[float]]) -> None:
        """Take over what ``to_plain`` gave, as much of its end as there is room for."""
        size = self._values.shape[1]
        rows = [[float(value) for value in plain[name]][-size:] for name in WATCHED]
        rows = [[torch.nan] * (size - len(row)) + row for row in rows]
        self._values = torch.tensor(rows, dtype=torch.float64).to(self._values.device)
        self._measure()

    def _measure(self) -> None:
        counts = (self._values == self._values).sum(dim=1, keepdim=True)
        middle = _median(self._values, counts)
        spread = _median((self._values - middle).abs(), counts)
        deviation = torch.maximum(_DEVIATIONS * spread, _SMALLEST * middle.abs()).clamp(min=1e-12)
        enough = counts >= FEWEST_STEPS
        self.middle = torch.where(enough, middle, 0.0).squeeze(1)
        self.deviation = torch.where(enough, deviation, torch.inf).squeeze(1)


def _median(values: Tensor, counts: Tensor) -> Tensor:
    """Median [rows, 1] of the first ``counts`` [rows, 1] values in order; NaN sorts behind them.

    torch.median is no option: on CUDA it is not among the deterministic operations.
    """
    ordered = torch.sort(values, dim=1).values
    low = ((counts - 1) // 2).clamp(min=0)
    high = (counts // 2).clamp(max=values.shape[1] - 1)
    return torch.cat([ordered.gather(1, low), ordered.gather(1, high)], dim=1).mean(1, True)
