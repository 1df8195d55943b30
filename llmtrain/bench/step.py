"""Times training steps of a run: the real loop, engine, guard and metrics, on batches from a seed.

Invariant: no step that compiles or warms up is among those that are timed, and none that is timed
runs under a profiler. On a device the times are read off events at the ends of steps, so that
timing makes the host wait nowhere that training does not.

    with World(config.parallel, config.engine) as world:
        measured = measure_steps(config, world)
    measured.step_s     # seconds of every timed step on this rank
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llmtrain.bench.attribution import Attribution, attribute
from llmtrain.bench.batches import bench_batch, document_lengths
from llmtrain.bench.memory import peak_bytes, reset_peak
from llmtrain.bench.rates import device_mark, synchronize
from llmtrain.bench.trace import read_trace
from llmtrain.build import engine_of
from llmtrain.config.bench import BenchConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import rank_rows
from llmtrain.engine.protocol import Engine, StepResult
from llmtrain.optim.schedule import learning_rate
from llmtrain.parallel.mesh import World
from llmtrain.run.progress import Progress
from llmtrain.train import loop
from llmtrain.train.feed import Copies, Feed
from llmtrain.train.guard import Guard, stop_signals
from llmtrain.train.metrics import Meter, Metrics
from llmtrain.train.profiler import Profiler

_NUM_SOURCES = 2
_NUM_BATCHES = 4
"""Different batches, used in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeasurement:
    """What one rank measured."""

    step_s: list[float]
    """Seconds of each timed step."""
    first_step_s: float
    """Seconds of the first step: compilation, allocation and warm-up of libraries with it."""
    compile_s: float
    """Seconds of that and of the other warm-up steps inside torch.compile; 0 where it is off."""
    graphs: int
    """Graphs compiled during warm-up."""
    recompilations: int
    """Graphs compiled after it: 0, or the figures are not those of a long run."""
    data_wait_s: float
    """Seconds a timed step waited for its batch to be on the device, on average."""
    memory_bytes: int
    """Peak of the timed steps: allocated on the device, or resident in the process."""
    state_bytes: int
    """Memory in use between two steps: parameters and optimizer; of a process, all that is."""
    attribution: Attribution | None
    """Time by part of the profiled steps; None where none was profiled."""
    trace: Path | None
    """Where the trace was kept, if it was."""
    lengths: dict[int, int]
    """Documents in the global batch by their length, averaged over the batches."""


def measure_steps(config: BenchConfig, world: World, name: str) -> StepMeasurement:
    """Train ``config.warmup_steps``, then ``config.steps``, then ``config.profiled_steps`` steps.

    Collective; ``name`` is that of the folder traces are kept in.
    """
    whole = [bench_batch(config, number) for number in range(_NUM_BATCHES)]
    with ExitStack() as stack:
        engine = engine_of(config, world, _NUM_SOURCES)
        stack.callback(engine.close)
        stack.enter_context(loop.GarbageCollection())
        bench = _Bench(config, world, engine, whole)
        stack.enter_context(bench.running())
        bench.run(1)
        first_step_s = bench.clock.durations()[0]
        bench.run(config.warmup_steps - 1)
        graphs, compile_s = _compiled()
        held = reset_peak(world.device)
        bench.run(config.steps)
        step_s, waited_s = bench.clock.durations(), bench.batches.waited_s
        memory = peak_bytes(world.device)
        recompilations = _compiled()[0] - graphs
        attribution, trace = bench.profiled(name)
    return StepMeasurement(
        step_s=step_s,
        first_step_s=first_step_s,
        compile_s=compile_s,
        graphs=graphs,
        recompilations=recompilations,
        data_wait_s=waited_s / config.steps,
        memory_bytes=memory,
        state_bytes=held,
        attribution=attribution,
        trace=trace,
        lengths=document_lengths(whole),
    )


class _Batches:
    """Batches made before the clock starts, in turn; copied ahead by a thread as a run does."""

    def __init__(self, batches: list[StepBatch], copies: Copies) -> None:
        self._batches, self._copies = batches, copies
        self._reader = ThreadPoolExecutor(1, "batches")
        self._ahead: dict[int, Future[StepBatch]] = {}

    def at(self, step: int) -> StepBatch:
        for needed in (step, step + 1):
            if needed not in self._ahead:
                batch = self._batches[needed % len(self._batches)]
                self._ahead[needed] = self._reader.submit(self._copies.start, batch)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)


class _NothingSaved:
    """A run that keeps no checkpoint."""

    stalled_s = 0.0

    def due(self, progress: Progress) -> bool:
        return False

    def save(self, progress: Progress) -> bool:
        return True

    def wait(self) -> bool:
        return True


class _Clock:
    """Hook that marks the ends of steps: on the device's own clock where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def begin(self) -> None:
        """Start anew with nothing left to do on the device."""
        synchronize(self._device)
        self._marks = []
        self._mark()

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Mark the end of a step."""
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = device_mark()
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def durations(self) -> list[float]:
        """Seconds of each step since ``begin``; waits for the device."""
        synchronize(self._device)
        found = []
        for a, b in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(a, float) and isinstance(b, float):
                found.append(b - a)
            elif isinstance(a, torch.cuda.Event) and isinstance(b, torch.cuda.Event):
                found.append(a.elapsed_time(b) * 1e-3)
        return found


class _Bench:
    """The loop of a run, a few steps at a time."""

    def __init__(
        self, config: BenchConfig, world: World, engine: Engine, whole: list[StepBatch]
    ) -> None:
        training = config.training
        self._config, self._world, self._engine = config, world, engine
        mine = [
            rank_rows(b, world.dp_rank, world.dp_size, training.micro_batch_size, config.parallel)
            for b in whole
        ]
        copies = Copies(world.device)
        self._source = _Batches(mine, copies)
        seen_by_metrics = Feed(self._source, copies)
        self.batches = Feed(seen_by_metrics, copies)
        self.clock = _Clock(world.device)
        num_steps = config.warmup_steps + config.steps + config.profiled_steps + 1
        self._progress = Progress(
            num_steps=num_steps, steps=replace(training, batch_ramp=(), length_ramp=()).steps
        )
        self._schedule = learning_rate(config.optimizer, config.schedule, training.num_tokens)
        self._hooks: list[loop.Hook] = []
        if world.rank == 0:
            self._hooks.append(Metrics(
                [], Meter.of(config.model, world.device, world.world_size),
                schedule=self._schedule, source_names=[str(n) for n in range(_NUM_SOURCES)],
                batches=seen_by_metrics, batch_hash=lambda step: "",
                every_steps=config.monitor.log_every_steps,
            ))  # fmt: skip
        self._guard: Guard | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch for signals as a run does."""
        with stop_signals() as asked:
            self._guard = Guard(
                agree=self._world.agree, stop_asked=asked, device=self._world.device,
                check_every_steps=self._config.monitor.log_every_steps,
            )  # fmt: skip
            try:
                yield
            finally:
                self._source.close()

    def run(self, steps: int, *hooks: loop.Hook) -> None:
        """Run ``steps`` more steps; a stop signal ends the process as Ctrl-C would."""
        if not steps or self._guard is None:
            return
        self._progress.stop_at_step = self._progress.step + steps
        self.batches.waited_s = 0.0
        self.clock.begin()
        loop.train(
            self._engine, self.batches, progress=self._progress, schedule=self._schedule,
            guard=self._guard, checkpoints=_NothingSaved(),
            hooks=[*self._hooks, self.clock, *hooks],
        )  # fmt: skip
        if self._guard.reason is not None:
            raise KeyboardInterrupt

    def profiled(self, name: str) -> tuple[Attribution | None, Path | None]:
        """Profile steps after one in which the tracer warms up; read where their time went."""
        count, rank = self._config.profiled_steps, self._world.rank
        if not count:
            return None, None
        with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
            kept = Path(self._config.out) / "traces" / name
            folder = kept if self._config.profile else Path(scratch)
            steps = (self._progress.step + 2, self._progress.step + 1 + count)
            profiler = Profiler(folder, rank, steps, self._progress, self._config.profile)
            with profiler:
                self.run(count + 1, profiler)
            found = attribute(read_trace(profiler.path))
        return found, profiler.path if self._config.profile else None


def _compiled() -> tuple[int, float]:
    """Graphs that torch.compile has made in this process, and seconds it took."""
    if "torch._dynamo.utils" not in sys.modules:  # nothing can have been compiled
        return 0, 0.0
    from torch._dynamo.utils import compilation_time_metrics, counters

    seconds = compilation_time_metrics.get("_compile.compile_inner", [])
    return int(counters["stats"]["unique_graphs"]), float(sum(seconds))
