"""A profiler's trace as nested stretches of host time and the device work they started.

Invariant: the input is what Perfetto shows, the Chrome trace of torch's profiler and nothing else,
so every number made from it can be checked by looking. Times are microseconds.

    trace = read_trace(Path("bench/traces/rank0.json.gz"))
    trace.steps[0].duration, trace.stack_at(trace.main_thread, trace.steps[0].start)
"""

import gzip
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEP = "ProfilerStep#"
"""What torch's profiler calls one round of the loop."""

_HOST = ("cpu_op", "user_annotation")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")

Thread = tuple[Any, Any]
"""Process and thread of the trace."""


@dataclass(slots=True, eq=False)
class Stretch:
    """Host time under one name, with what it encloses."""

    name: str
    """Operation or annotation."""
    annotation: bool
    """Whether it is an annotation, not an operation."""
    start: float
    """When it began."""
    end: float
    """When it ended."""
    parent: "Stretch | None" = None
    """What encloses it most closely on its thread."""
    inner: float = 0.0
    """Time that its children account for."""

    @property
    def duration(self) -> float:
        """Time from begin to end."""
        return self.end - self.start

    @property
    def own(self) -> float:
        """Time that no child accounts for."""
        return max(0.0, self.duration - self.inner)

    def stack(self) -> list["Stretch"]:
        """List what encloses it, the outermost first, and itself."""
        found, at = [], self
        while True:
            found.append(at)
            if at.parent is None:
                return found[::-1]
            at = at.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWork:
    """A kernel, a copy or a fill on the device."""

    name: str
    """Name of the kernel."""
    start: float
    """When it began on the device."""
    end: float
    """When it ended there."""
    thread: Thread | None
    """Thread that started it; None where the trace does not say."""
    launched: float
    """When that thread started it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What happened on the host, by thread, and on the device."""

    threads: dict[Thread, list[Stretch]]
    """Stretches of every thread in order of their begin."""
    device: list[DeviceWork]
    """Work of the device in order of its begin; empty on a machine without one."""
    main_thread: Thread
    """The thread that ran the loop."""
    _begins: dict[Thread, list[float]] = field(default_factory=dict)

    @property
    def steps(self) -> list[Stretch]:
        """Rounds of the loop, data and hooks included."""
        return [s for s in self.threads[self.main_thread] if s.name.startswith(STEP)]

    def stack_at(self, thread: Thread, time: float) -> list[Stretch]:
        """List what encloses an instant on a thread, the outermost first."""
        stretches = self.threads.get(thread, [])
        begins = self._begins.setdefault(thread, [s.start for s in stretches])
        index = bisect_right(begins, time) - 1
        at = stretches[index] if index >= 0 else None
        while at is not None and at.end < time:
            at = at.parent
        return [] if at is None else at.stack()


def read_trace(path: Path) -> Trace:
    """Read a trace that ``train.profiler`` wrote.

    Raises:
        ValueError: there is no whole step in it.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return parse_trace(json.load(file)["traceEvents"])


def parse_trace(events: Iterable[dict[str, Any]]) -> Trace:
    """Sort the events of a Chrome trace out; see ``read_trace``."""
    host: dict[Thread, list[Stretch]] = defaultdict(list)
    launches: dict[Any, tuple[Thread, float]] = {}
    found = []
    for event in events:
        category = event.get("cat")
        if event.get("ph") != "X":
            continue
        start, thread = float(event["ts"]), (event["pid"], event["tid"])
        end, arguments = start + float(event.get("dur", 0.0)), event.get("args", {})
        if category in _HOST:
            host[thread].append(Stretch(event["name"], category == _HOST[1], start, end))
        elif category in _LAUNCH and "correlation" in arguments:
            launches[arguments["correlation"]] = (thread, start)
        elif category in _DEVICE:
            found.append((event["name"], start, end, arguments.get("correlation")))
    for stretches in host.values():
        _nest(stretches)
    main = [t for t, stretches in host.items() if any(s.name.startswith(STEP) for s in stretches)]
    if not main:
        raise ValueError(f"the trace holds no {STEP} annotation; profile with a schedule")
    device = []
    for name, start, end, correlation in found:
        by, at = launches.get(correlation, (None, start))
        device.append(DeviceWork(name=name, start=start, end=end, thread=by, launched=at))
    device.sort(key=lambda work: work.start)
    return Trace(threads=dict(host), device=device, main_thread=main[0])


def _nest(stretches: list[Stretch]) -> None:
    """Sort by begin and find the parent of each; one that outlasts its parent is cut to it."""
    stretches.sort(key=lambda s: (s.start, -s.end))
    open_: list[Stretch] = []
    for stretch in stretches:
        while open_ and open_[-1].end <= stretch.start:
            open_.pop()
        if open_:
            stretch.parent = open_[-1]
            stretch.end = min(stretch.end, stretch.parent.end)
            stretch.parent.inner += stretch.duration
        open_.append(stretch)
