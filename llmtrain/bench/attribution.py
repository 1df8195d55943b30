"""Where the time of profiled steps went: by part and by phase.

Invariant: the parts add up to the profiled steps. Without a device every microsecond of the loop's
thread belongs to the innermost thing that was running; with one, every microsecond between the
first and the last kernel belongs to the kernel that ran, computation before communication, and to
``waiting`` where none did.

    found = attribute(read_trace(path))
    found.parts["matmul"], sum(found.parts.values()) == found.step_s
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from llmtrain.bench.trace import DeviceWork, Stretch, Trace
from llmtrain.parallel.scopes import BACKWARD, COMMUNICATION, DATA, FORWARD, LOSS, OPTIMIZER

PARTS = (
    "attention", "matmul", "norm and elementwise", "loss", "optimizer", "data", "communication",
    "clip and metrics", "waiting",
)  # fmt: skip
"""Parts of a step in the order of tables.

``clip and metrics`` is every operation outside forward, backward, optimizer, data and
communication. ``waiting`` is the host between operations, or the device without work.
"""

PHASES = ("forward", "backward", "optimizer")
"""What a loop written by hand would have to do as well."""

_COMMUNICATION = re.compile(
    rf"^{COMMUNICATION}|^c10d::|^gloo:|nccl|^FSDP::|^_c10d_functional::|^record_param_comms"
)
_OPTIMIZER = re.compile(rf"^{OPTIMIZER}|^Optimizer\.(step|zero_grad)#")
_LOSS = re.compile(rf"^{LOSS}|CrossEntropy|cross_entropy|nll_loss|log_softmax")
_FORWARD = re.compile(rf"^{FORWARD}|^Forward \d|^\d+F\d+")
_BACKWARD = re.compile(rf"^{BACKWARD}|^Backward \d|^autograd::engine::evaluate_function")
_ATTENTION = re.compile(
    r"scaled_dot_product|flash_?attn|flash_fwd|flash_bwd|fmha|flex_attention|attention", re.I
)
_MATMUL = re.compile(
    r"^aten::_?(addmm|mm|bmm|baddbmm|linear|matmul|scaled_mm|grouped_mm|int_mm)|mkldnn.*linear"
    r"|mkl.*linear|onednn|gemm|cutlass|cublas|nvjet|xmma|triton_tem_.*mm",
    re.I,
)
_NO_OPERATION = re.compile(
    r"^autograd::engine|Backward\d*$|^torch::autograd::|^torch::dynamo|^TorchDynamo|^Pregraph"
)
"""Operations whose own time is the machinery that calls others."""


_WHOLE = (
    ("communication", _COMMUNICATION), ("optimizer", _OPTIMIZER),
    ("data", re.compile(f"^{DATA}")), ("loss", _LOSS),
)  # fmt: skip
"""Parts that whatever runs inside belongs to, the first that fits."""

_PHASES = (("forward", _FORWARD), ("backward", _BACKWARD), ("optimizer", _OPTIMIZER))


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Mean over the profiled steps, in seconds per step."""

    step_s: float
    """A profiled step."""
    parts: dict[str, float]
    """Time by PARTS; adds up to ``step_s``."""
    phases: dict[str, float]
    """Time by PHASES, from begin to end of each."""
    overhead_s: float
    """The step without its phases and without communication outside them."""
    hidden_communication_s: float
    """Communication while the device computed; not in ``parts``. 0 without a device."""


def attribute(trace: Trace) -> Attribution:
    """Divide the steps of a trace among parts and phases."""
    made = _on_device(trace) if trace.device else _on_host(trace)
    count = len(trace.steps)
    parts = {name: us * 1e-6 / count for name, us in made.parts.items()}
    phases = {name: us * 1e-6 / count for name, us in made.phases.items()}
    step_s = sum(parts.values())
    beside = made.communication_outside * 1e-6 / count
    return Attribution(
        step_s=step_s,
        parts=parts,
        phases=phases,
        overhead_s=max(0.0, step_s - sum(phases.values()) - beside),
        hidden_communication_s=made.hidden * 1e-6 / count,
    )


def part_of(names: Sequence[str], inside_annotation: bool = False) -> str:
    """Name the part that a stack of names belongs to, the outermost name first.

    ``inside_annotation`` says that the innermost is an annotation: no operation was running.
    """
    for part, pattern in _WHOLE:
        if any(_matches(pattern, name) for name in names):
            return part
    innermost = names[-1]
    if inside_annotation or _matches(_NO_OPERATION, innermost):
        return "waiting"
    if phase_of(names) is None:
        return "clip and metrics"
    if any(_matches(_ATTENTION, name) for name in names):
        return "attention"
    return "matmul" if _matches(_MATMUL, innermost) else "norm and elementwise"


def phase_of(names: Iterable[str]) -> str | None:
    """Name the phase that a stack belongs to; None for what is beside them."""
    for name in names:
        for phase, pattern in _PHASES:
            if _matches(pattern, name):
                return phase
    return None


@cache
def _matches(pattern: re.Pattern[str], name: str) -> bool:
    """Search once for each of the few names among the many stretches of a trace."""
    return pattern.search(name) is not None


@dataclass(slots=True)
class _Sums:
    parts: dict[str, float]
    phases: dict[str, float]
    communication_outside: float = 0.0
    hidden: float = 0.0

    @classmethod
    def empty(cls) -> "_Sums":
        return cls(dict.fromkeys(PARTS, 0.0), dict.fromkeys(PHASES, 0.0))


def _on_host(trace: Trace) -> _Sums:
    """Give the loop's thread, microsecond by microsecond, to what was running innermost."""
    sums = _Sums.empty()
    steps = set(map(id, trace.steps))
    for stretch in trace.threads[trace.main_thread]:
        stack = stretch.stack()
        if id(stack[0]) not in steps:
            continue
        names = [s.name for s in stack]
        part = part_of(names, stretch.annotation)
        sums.parts[part] += stretch.own
        phase = phase_of(names)
        if phase is not None and phase_of(names[:-1]) is None:
            sums.phases[phase] += stretch.duration
        if phase is None and part == "communication":
            sums.communication_outside += stretch.own
    return sums


@dataclass(slots=True)
class _Labelled:
    work: DeviceWork
    part: str
    phase: tuple[str, float] | None


def _on_device(trace: Trace) -> _Sums:
    """Give the device's time to what ran on it, from the first kernel of the steps to the last."""
    sums = _Sums.empty()
    begin, end = trace.steps[0].start, trace.steps[-1].end
    works = [_label(trace, work) for work in trace.device if begin <= work.launched <= end]
    _sweep(works, sums)
    spans: dict[tuple[str, float], list[float]] = {}
    for one in works:
        if one.phase is not None and one.part != "communication":
            span = spans.setdefault(one.phase, [one.work.start, one.work.end])
            span[0], span[1] = min(span[0], one.work.start), max(span[1], one.work.end)
    for (phase, _), (start, stop) in spans.items():
        sums.phases[phase] += stop - start
    return sums


def _label(trace: Trace, work: DeviceWork) -> _Labelled:
    """Find part and phase of a kernel from where it was launched, then from its own name.

    The backward runs on a thread of its own while the loop waits in it: what the loop is in counts.
    """
    stack: list[Stretch] = trace.stack_at(trace.main_thread, work.launched)
    if work.thread is not None and work.thread != trace.main_thread:
        stack = [*stack, *trace.stack_at(work.thread, work.launched)]
    names = [s.name for s in stack if not s.annotation or s.name != work.name]
    operation = next((s.name for s in reversed(stack) if not s.annotation), "")
    part = part_of([*names, work.name])
    if part == "norm and elementwise" and _MATMUL.search(operation):
        part = "matmul"
    phase = phase_of(names)
    at = next((s.start for s in stack if phase is not None and phase_of([s.name])), 0.0)
    return _Labelled(work, part, None if phase is None else (phase, at))


def _sweep(works: list[_Labelled], sums: _Sums) -> None:
    """Walk along the device's time: computation counts first, communication where it is alone."""
    edges = sorted({edge for one in works for edge in (one.work.start, one.work.end)})
    waiting = sorted(works, key=lambda one: one.work.start)
    running: list[_Labelled] = []
    following = 0
    for start, stop in pairwise(edges):
        while following < len(waiting) and waiting[following].work.start <= start:
            running.append(waiting[following])
            following += 1
        running = [one for one in running if one.work.end > start]
        computing = [one for one in running if one.part != "communication"]
        if computing:
            sums.parts[computing[0].part] += stop - start
            sums.hidden += stop - start if len(computing) < len(running) else 0.0
        elif running:
            sums.parts["communication"] += stop - start
            outside = all(one.phase is None for one in running)
            sums.communication_outside += stop - start if outside else 0.0
        else:
            sums.parts["waiting"] += stop - start
