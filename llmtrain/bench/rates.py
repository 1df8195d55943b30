"""What the machine can do at best: how fast it copies, how fast it multiplies matrices.

Invariant: both are measured here, on random numbers, in buffers larger than any cache, as the best
of several tries; datasheets are not asked.

    rates = measure_rates(torch.device("cpu"), torch.float32, seconds=1.0)
    rates.copy_bytes_per_s, rates.matmul_flops_per_s
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

_COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 256 * 2**20}
_MATMUL_SIZES = {"cuda": (8192, 4096), "cpu": (2048, 1024)}
_LEAST_TRIES = 3
_TRIAL_S = 0.1
"""With less time than this it is the bench that is tried out, on small matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured ceilings of one device."""

    copy_bytes_per_s: float
    """Bytes read plus bytes written per second by a large copy."""
    matmul_flops_per_s: float
    """Operations per second of a large square product, 2 n^3 each."""

    def floor_s(self, flops: float, bytes_moved: float) -> float:
        """Seconds below which work cannot run: the longer of its products and its copies."""
        return max(flops / self.matmul_flops_per_s, bytes_moved / self.copy_bytes_per_s)


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float) -> Rates:
    """Measure both rates on ``device``, products in ``dtype``, about ``seconds`` each."""
    copy_s, moved = _copy(device, seconds)
    matmul = max(_matmul(size, device, dtype, seconds) for size in _MATMUL_SIZES[device.type])
    return Rates(copy_bytes_per_s=moved / copy_s, matmul_flops_per_s=matmul)


def _copy(device: torch.device, seconds: float) -> tuple[float, int]:
    """Best seconds of a copy, and the bytes it read and wrote."""
    count = int(_COPY_BYTES[device.type] * min(1.0, seconds)) // 4
    source = torch.rand(max(count, 1), device=device)
    target = torch.empty_like(source)
    best = min(times(lambda: target.copy_(source), device, seconds))
    return best, 2 * source.numel() * source.element_size()


def _matmul(size: int, device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    """Operations per second of the best of some products of random square matrices."""
    if seconds < _TRIAL_S:
        size //= 8
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = min(times(lambda: torch.mm(a, b, out=out), device, seconds / 2))
    return 2.0 * size**3 / best


def spread(values: Sequence[float]) -> dict[str, float]:
    """Give the median and the quartiles."""
    if len(values) < 2:
        return dict.fromkeys(("median", "lower_quartile", "upper_quartile"), values[0])
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "lower_quartile": lower, "upper_quartile": upper}


def times(
    call: Callable[[], object], device: torch.device, seconds: float, least: int = _LEAST_TRIES
) -> list[float]:
    """Seconds of each of ``least`` or more calls that fill ``seconds``, two before them left out.

    On a device the calls are queued and timed there, by events.
    """
    call()
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    once = max(time.perf_counter() - started, 1e-7)
    count = max(least, min(int(seconds / once), 1000))
    if device.type != "cuda":
        found = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            found.append(time.perf_counter() - started)
        return found
    events = [device_mark() for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    synchronize(device)
    return [a.elapsed_time(b) * 1e-3 for a, b in pairwise(events)]


def device_mark() -> torch.cuda.Event:
    """Make an event that knows when the device came to it."""
    make: Any = torch.cuda.Event
    event: torch.cuda.Event = make(enable_timing=True)
    return event


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
