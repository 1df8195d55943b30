"""Tasks of lm-evaluation-harness every some steps of a run, on the weights as they are then.

The weights are taken from the engine, whatever its layout, into a model that the ranks share: all
of them where they divide the key and value heads, else those of the tensor-parallel group. Nothing
is exported or saved; the model is freed when the tasks are done.

Invariant: training does not notice. The engine's tensors are read, every random state that tasks
or the harness touch is put back, and caches of keys and values are those of the model made here.
Tasks say that they move with every batch and token, so none is long enough to be taken for a hang;
where the run is to stop they are left off before the next batch.

    hook = TasksInTraining(config, run, world, engine, report=metrics.add)   # on every rank
    hooks.append(hook)
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmtrain.checkpoint.start import ORIGIN
from llmtrain.config.generate import EvalConfig
from llmtrain.config.run import RunConfig
from llmtrain.engine.protocol import StepResult
from llmtrain.eval.harness import (
    find_tasks,
    keep_record,
    load_data,
    numbers,
    require_harness,
    run_tasks,
)
from llmtrain.eval.trained import DTYPES, TrainedRun
from llmtrain.hang.heartbeat import Phase
from llmtrain.model.transformer import Transformer
from llmtrain.ops.attention.choose import needs_of, select_attention
from llmtrain.ops.kernels import select_kernels
from llmtrain.parallel.inference import SpreadTransformer, sharing_group
from llmtrain.parallel.mesh import World
from llmtrain.run.directory import RunDirectory
from llmtrain.run.progress import Progress
from llmtrain.train.evaluation import Pause, endless

logger = logging.getLogger(__name__)

FOLDER = "harness"
"""Folder of the run that has the results of every evaluation."""


class _LeftOffError(Exception):
    """The run is to stop."""


class Weights(Protocol):
    """The part of an engine that is needed."""

    def full_parameters(self) -> dict[str, Tensor]:
        """Full logical parameters by global name, on CPU, on every rank (collective)."""
        ...


class TasksInTraining:
    """Hook that runs on every rank, before the metrics hook of the rank that writes."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        world: World,
        engine: Weights,
        *,
        report: Callable[[Mapping[str, Any], float], None] | None,
        pause: Pause = endless,
    ) -> None:
        """Evaluate every ``evaluation.tasks_every_steps``; ``report`` takes fields and seconds.

        Raises:
            ConfigError: lm_eval is not installed, or knows no such task.
            DataError: the data of a task cannot be had.
        """
        self._config, self._run, self._world, self._engine = config, run, world, engine
        self._report, self._pause = report, pause
        self._every_steps = config.evaluation.tasks_every_steps or 1
        self._evaluation = EvalConfig(
            run=str(run.path), tasks=config.evaluation.tasks, harness=config.evaluation.harness
        )
        require_harness(self._evaluation.tasks)
        with _untouched(self._world.device):
            self._tasks = find_tasks(self._evaluation)
            load_data(self._evaluation, self._tasks)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        """Evaluate where it is due."""
        if progress.step % self._every_steps and not progress.finished:
            return
        result.applied.item()  # the training steps before are not evaluation time
        started = time.perf_counter()
        try:
            with self._pause() as stop:
                found = self._evaluate(progress.step, stop)
        except _LeftOffError:
            logger.warning(
                "step %d: tasks left off, the run stops or goes back; "
                "`llmtrain eval run=%s tasks=[%s]` runs them on its newest checkpoint",
                progress.step, self._run.path, ",".join(self._evaluation.tasks),
            )  # fmt: skip
            return
        if self._report is None or found is None:
            return
        keep_record(self._run.path / FOLDER / f"step-{progress.step:09d}", self._evaluation,
                    progress.step, found)  # fmt: skip
        flat = {k.removeprefix("harness/"): v for k, v in numbers(found["results"]).items()}
        logger.info("step %d: %s", progress.step, _line(flat))
        self._report({"harness": flat}, time.perf_counter() - started)

    def _evaluate(self, step: int, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Run the tasks; raises _LeftOffError where ``stop`` is true before a batch."""

        def moves() -> None:
            self._world.beat.at(Phase.EVALUATE)

        def between() -> None:
            moves()
            if stop():
                raise _LeftOffError

        with _untouched(self._world.device):
            between()
            trained = self._trained(step)
            return run_tasks(self._evaluation, trained, self._tasks, between=between, moves=moves)

    def _trained(self, step: int) -> TrainedRun:
        """Take the weights into a model for inference; collective."""
        return TrainedRun(
            directory=self._run, config=self._config,
            model=model_of(self._engine, self._config, self._world),
            device=self._world.device, step=step, rank=self._world.rank,
            origin=self._run.read_record().get(ORIGIN, {}),
        )  # fmt: skip


def model_of(engine: Weights, config: RunConfig, world: World) -> Transformer:
    """Make a model for inference of the weights of an engine, shared by ranks; collective.

    Host memory holds the whole weights once on every rank while it is made.
    """
    needs = needs_of(config.model, config.engine, training=False)
    attention = select_attention(config.engine.attention, world.device, needs)
    kernels = select_kernels(config.engine.kernels, world.device)
    dtype, group = DTYPES[config.engine.precision], sharing_group(world, config.model)
    weights = _Gathered(engine.full_parameters())
    if group is not None:
        with torch.device("meta"):
            spread = SpreadTransformer(config.model, group, attention, kernels)
        spread.load(weights, world.device, dtype)
        return spread.eval().requires_grad_(False)
    with torch.device("meta"):
        model = Transformer(config.model, attention=attention, kernels=kernels)
    model.load_state_dict(weights.whole, assign=True)
    return model.to(device=world.device, dtype=dtype).eval().requires_grad_(False)


class _Gathered:
    """Whole weights in host memory, as a model cut over ranks reads them."""

    def __init__(self, whole: dict[str, Tensor]) -> None:
        self.whole = whole

    def pieces(self, name: str) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield the one piece of a parameter, and let go of it."""
        value = self.whole.pop(name)
        yield (0,) * value.dim(), value


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Put back the random states and the log level that the harness sets."""
    devices = [device] if device.type == "cuda" else []
    python, numbers_, level = random.getstate(), np.random.get_state(), logging.getLogger().level
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers_)
        logging.getLogger().setLevel(level)


def _line(flat: Mapping[str, float]) -> str:
    """Metrics of a log line, without their standard errors."""
    return " | ".join(f"{k} {v:.4f}" for k, v in flat.items() if "_stderr" not in k)
