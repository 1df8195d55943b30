"""What a run reports at its logging steps, summed on the device in between.

The host waits for the device at logging steps only. One row of numbers goes to every sink, first of
all to ``metrics.jsonl``; rates are wall-clock, evaluation apart.

    metrics = Metrics(sinks, meter, schedule=lr, source_names=("web", "code"), every_steps=10)
    metrics.after_step(progress, result)   # a hook of the loop
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.engine.protocol import StepResult
from llmtrain.optim.schedule import Schedule
from llmtrain.planner.devices import peak_tflops
from llmtrain.planner.flops import convention, flops_per_token
from llmtrain.run.progress import Progress
from llmtrain.train.feed import Feed
from llmtrain.train.preference_loss import reward_fields

Row = dict[str, Any]
"""JSON-ready numbers of one logging step; null where a number is not finite or not known."""


class Sink(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Take one row."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Turns tokens and seconds into MFU and says what it counted."""

    model: ModelConfig
    """The architecture: operations per token depend on it and on the length of the rows."""
    peak_flops: float | None
    """Peak operations per second of all devices together; None where it is not known."""
    device: torch.device
    """Device whose memory is reported."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        device: torch.device,
        world_size: int,
        known_peak_tflops: float | None = None,
    ) -> "Meter":
        """The meter of a model on ``world_size`` devices; the peak of a known GPU is looked up."""
        peak = known_peak_tflops
        if peak is None and device.type == "cuda":
            peak = peak_tflops(torch.cuda.get_device_name(device))
        peak_flops = None if peak is None else peak * 1e12 * world_size
        return cls(model=model, peak_flops=peak_flops, device=device)

    def utilization(self, tokens: Mapping[int, int], seconds: float) -> Row:
        """MFU fields of a row; ``tokens`` is by the length of the rows they stood in."""
        return {
            "mfu": self._mfu(tokens, seconds, causal=False),
            "mfu_causal": self._mfu(tokens, seconds, causal=True),
            "mfu_convention": convention(self.model),
        }

    def _mfu(self, tokens: Mapping[int, int], seconds: float, causal: bool) -> float | None:
        if not self.peak_flops:
            return None
        operations = [
            count * flops_per_token(self.model, length, causal=causal)
            for length, count in tokens.items()
        ]
        return sum(operations) / seconds / self.peak_flops

    def memory_bytes(self) -> int:
        """Largest memory so far: allocated on the GPU, or resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@dataclass(slots=True)
class _Interval:
    """Device sums since the last row."""

    started: float
    num_steps: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None
    paused_s: float = 0.0
    extra: Row = field(default_factory=dict)

    def add(self, result: StepResult) -> None:
        """Add one step without waiting for the device; the sums of a skipped step do not count."""
        parts = {"loss": result.loss_sum, "targets": result.target_tokens, **result.metrics}
        counted = {n: torch.where(result.applied, value, 0) for n, value in parts.items()}
        counted["applied"] = result.applied.to(torch.int32)
        for name, value in counted.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.grad_norm = result.grad_norm
        self.num_steps += 1


class Metrics:
    """Hook that makes a row at every logging step and hands it to the sinks in order."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        meter: Meter,
        *,
        schedule: Schedule,
        source_names: Sequence[str],
        batches: Feed,
        batch_hash: Callable[[int], str],
        every_steps: int,
        more: Sequence[Callable[[Progress, StepResult], Row]] = (),
    ) -> None:
        """Report to ``sinks`` every ``every_steps`` steps and after the last one.

        ``more`` gives further fields of a row, asked for when the row is made.
        """
        self._sinks = sinks
        self._meter = meter
        self._schedule = schedule
        self._source_names = source_names
        self._batches = batches
        self._batch_hash = batch_hash
        self._every_steps = every_steps
        self._more = tuple(more)
        self._waited_s = batches.waited_s
        self._interval = _Interval(time.perf_counter())

    def add(self, fields: Mapping[str, Any], took_s: float) -> None:
        """Put ``fields`` on a row at this step; ``took_s`` is left out of the step time."""
        self._interval.extra.update(fields)
        self._interval.paused_s += took_s

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Count the step; write a row where one is due."""
        interval = self._interval
        interval.add(result)
        due = progress.step % self._every_steps == 0 or progress.finished or interval.extra
        if not due:
            return
        row = self._row(progress, interval)
        for fields in self._more:
            row.update(fields(progress, result))
        for sink in self._sinks:
            sink.write(row)
        self._interval = _Interval(time.perf_counter())

    def _row(self, progress: Progress, interval: _Interval) -> Row:
        """Wait for the device and make the row of the interval that ends here."""
        sums: dict[str, Any] = {name: value.tolist() for name, value in interval.sums.items()}
        grad_norm = interval.grad_norm.item() if interval.grad_norm is not None else None
        now = time.perf_counter()
        step_time_s = (now - interval.started - interval.paused_s) / interval.num_steps
        data_wait_s = (self._batches.waited_s - self._waited_s) / interval.num_steps
        self._waited_s = self._batches.waited_s
        tokens = progress.last_tokens(interval.num_steps)
        took_s = step_time_s * interval.num_steps
        return {
            "step": progress.step,
            "num_steps": progress.num_steps,
            "tokens": progress.tokens,
            **_losses(sums),
            "grad_norm": _finite(grad_norm),
            "lr": self._schedule(progress.tokens),
            "sequence_length": progress.steps.shape(progress.step - 1).sequence_length,
            "tokens_per_s": sum(tokens.values()) / took_s,
            **self._meter.utilization(tokens, took_s),
            "memory_bytes": self._meter.memory_bytes(),
            "step_time_s": step_time_s,
            "data_wait_s": data_wait_s,
            "batch_hash": self._batch_hash(progress.step - 1),
            "skipped_steps": interval.num_steps - sums["applied"],
            **per_source(self._source_names, sums),
            **reward_fields(sums),
            **interval.extra,
            "time": time.time(),
        }


def per_source(names: Sequence[str], sums: Mapping[str, Any], prefix: str = "source_") -> Row:
    """Mean loss and targets by source name; a source without targets has no loss."""
    losses = sums.get("source_loss_sum", [])
    counts = sums.get("source_tokens", [])
    by_name = list(zip(names, losses, counts, strict=False))
    return {
        f"{prefix}loss": {name: _ratio(loss, count) for name, loss, count in by_name if count},
        f"{prefix}tokens": {name: count for name, _, count in by_name},
    }


def _losses(sums: Mapping[str, Any]) -> Row:
    """Mean cross entropy as ``loss``; what z-loss adds to the optimised sum is shown apart."""
    if "z_loss_sum" not in sums:
        return {"loss": _ratio(sums["loss"], sums["targets"])}
    z_loss = sums["z_loss_sum"]
    return {
        "loss": _ratio(sums["loss"] - z_loss, sums["targets"]),
        "z_loss": _ratio(z_loss, sums["targets"]),
    }


def _ratio(total: float, count: float) -> float | None:
    return _finite(total / count) if count else None


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None
