"""Times every attention backend and every fused kernel in the shapes of a run, alone.

Invariant: what is timed was right: its results and gradients are first compared with the definition
in fp64, and what is beyond the tolerance of its type gets no time. Inputs are random, rows hold
documents as in training, and buffers are used in turn so that no cache holds them.

    rows = measure_kernels(config, torch.device("cpu"), rates)
    rows[0]["backend"], rows[0]["pass"], rows[0]["tflops"]
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtrain.bench.cases import AttentionCase, KernelCase, attention_case, kernel_cases
from llmtrain.bench.rates import Rates, spread, times
from llmtrain.config.bench import BenchConfig
from llmtrain.errors import LLMTrainError
from llmtrain.ops.attention.choose import ATTENTION, needs_of, why_not
from llmtrain.ops.attention.spec import AttentionFunction
from llmtrain.ops.kernels import KERNELS, TORCH_KERNELS, Kernels
from llmtrain.parallel.precision import COMPUTE_DTYPES

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Call = Callable[..., Any]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest ||result - definition|| / ||definition|| by type of the inputs."""

_CHECKED_TOKENS = 512
_REFERENCE = "reference"
_CACHES_BYTES = 128 * 2**20
_MAX_SETS = 16


def measure_kernels(config: BenchConfig, device: torch.device, rates: Rates) -> list[Row]:
    """Measure all backends on ``device``; those that cannot run have a ``reason`` and no times."""
    dtype = COMPUTE_DTYPES[config.engine.precision]
    bench = _Bench(device, dtype, rates, config.steps, config.rate_seconds)
    return [*_attention(config, bench), *_kernels(config, bench)]


class WrongResultError(LLMTrainError):
    """A kernel does not compute what it should."""


@dataclass(frozen=True, slots=True)
class _Bench:
    """How kernels are timed."""

    device: torch.device
    dtype: torch.dtype
    rates: Rates
    repeats: int
    seconds: float

    def timed(self, call: Callable[[], object]) -> Row:
        """Median and quartiles of the seconds of a call."""
        found = times(call, self.device, self.seconds / 4, least=self.repeats)
        return {**spread(found), "repeats": len(found)}


def _attention(config: BenchConfig, bench: _Bench) -> list[Row]:
    case = attention_case(config, bench.device, bench.dtype)
    needs = needs_of(config.model, config.engine)
    rows: list[Row] = []
    for name, backend in ATTENTION.items():
        reason = why_not(name, bench.device, needs)
        if reason is None and name == _REFERENCE:
            reason = "is the definition in fp64 that the others are compared with; not timed"
        if reason is not None:
            rows.append(_absent("attention", name, reason))
            continue
        measure = partial(_attention_rows, case, backend.function, bench)
        rows += _guarded("attention", name, measure)
    return rows


def _attention_rows(case: AttentionCase, function: AttentionFunction, bench: _Bench) -> list[Row]:
    """Check a backend on the first tokens of a row, then time it on the whole micro-batch."""
    few = case.first(_CHECKED_TOKENS)
    definition = ATTENTION[_REFERENCE].function
    errors = _errors(
        lambda q, k, v: function(q, k, v, few.spec)[0],
        lambda q, k, v: definition(q, k, v, few.spec)[0],
        few.inputs(),
    )
    inputs = case.inputs()
    return _passes(
        lambda q, k, v: function(q, k, v, case.spec)[0], [inputs], errors,
        {"forward": (case.flops, 0.0), "backward": (2.5 * case.flops, 0.0)}, bench,
    )  # fmt: skip


def _kernels(config: BenchConfig, bench: _Bench) -> list[Row]:
    rows: list[Row] = []
    for name, backend in KERNELS.items():
        reason = backend.available(bench.device)
        if reason is not None:
            rows.append(_absent("kernels", name, reason))
            continue
        loaded = backend.load()
        for case in kernel_cases(config, bench.device, bench.dtype):
            rows += _guarded(case.name, name, partial(_kernel_rows, case, loaded, bench))
    return sorted(rows, key=lambda row: str(row["kernel"]))


def _kernel_rows(case: KernelCase, kernels: Kernels, bench: _Bench) -> list[Row]:
    errors = _errors(
        lambda *x: case.call(kernels, *x), lambda *x: case.call(TORCH_KERNELS, *x), case.inputs()
    )
    sets = [case.inputs()]
    moved = sum(t.numel() * t.element_size() for t in sets[0])
    sets += [case.inputs() for _ in range(min(_MAX_SETS, _caches(bench.device) // moved))]
    work = {"forward": (0.0, case.forward_bytes), "backward": (0.0, case.backward_bytes)}
    return _passes(lambda *x: case.call(kernels, *x), sets, errors, work, bench)


def _passes(
    call: Call,
    sets: Sequence[Sequence[Tensor]],
    errors: dict[str, float],
    work: dict[str, tuple[float, float]],
    bench: _Bench,
) -> list[Row]:
    """Time forward and backward of a call over several sets of inputs in turn."""
    turns = itertools.cycle(sets)
    runs: dict[str, Callable[[], object]] = {"forward": lambda: call(*next(turns))}
    if "backward" in errors:
        made = []
        for inputs in sets:
            outs = _differentiable(call(*inputs))
            leaves = [t for t in inputs if t.requires_grad]
            made.append((outs, leaves, [torch.randn_like(out) for out in outs]))
        graphs = itertools.cycle(made)

        def backward() -> object:
            outs, leaves, gradients = next(graphs)
            return torch.autograd.grad(outs, leaves, gradients, retain_graph=True)

        runs["backward"] = backward
    rows = []
    for name, run in runs.items():
        flops, moved = work[name]
        error, limit = errors[name], TOLERANCE[bench.dtype]
        if not error <= limit:
            raise WrongResultError(
                f"error {error:.1e} in the {name}, expected at most {limit:.0e} in {bench.dtype}"
            )
        taken = bench.timed(run)
        floor = bench.rates.floor_s(flops, moved)
        rate = ({"tflops": flops / taken["median"] / 1e12} if flops
                else {"gb_per_s": moved / taken["median"] / 1e9})  # fmt: skip
        rows.append({
            "pass": name, "reason": None, "s": taken,
            "roofline_s": floor, "share_of_roofline": floor / taken["median"], "error": error,
            **rate,
        })  # fmt: skip
    return rows


def _errors(call: Call, definition: Call, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Compare results and gradients with the definition on the same inputs in fp64."""
    exact = [
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in inputs
    ]
    given = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    got, want = _tensors(call(*given)), _tensors(definition(*exact))
    errors = {"forward": _distance(got, want)}
    outs, truth = _differentiable(got), _differentiable(want)
    if outs:
        gradients = [torch.randn_like(out) for out in outs]
        doubled = [gradient.double() for gradient in gradients]
        leaves = [t for t in given if t.requires_grad]
        whole = [t for t in exact if t.requires_grad]
        errors["backward"] = _distance(
            torch.autograd.grad(outs, leaves, gradients),
            torch.autograd.grad(truth, whole, doubled),
        )
    return errors


def _distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest relative error over pairs of tensors."""
    pairs = [(a.detach().double(), b.detach().double()) for a, b in zip(got, want, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def _tensors(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _differentiable(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else list(result)
    return [tensor for tensor in found if tensor.requires_grad]


def _caches(device: torch.device) -> int:
    """Bytes that a cache may hold of what was just used."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _CACHES_BYTES


def _guarded(kernel: str, backend: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """Measure; what fails on this device in these shapes is listed with the reason."""
    try:
        return [{"kernel": kernel, "backend": backend, **row} for row in measure()]
    except (LLMTrainError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        logger.warning("%s %s does not run: %s", kernel, backend, error)
        return [_absent(kernel, backend, f"fails: {str(error).splitlines()[0]}")]


def _absent(kernel: str, backend: str, reason: str) -> Row:
    return {"kernel": kernel, "backend": backend, "pass": None, "reason": reason}
