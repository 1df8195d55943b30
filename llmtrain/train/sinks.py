"""Opens every place the rows of a run go to, in the order they are told.

Invariant: ``metrics.jsonl`` has a row before anything else is told of it, room on the disk
permitting; no sink that fails takes the run with it.

    sinks = open_sinks(stack, config.monitor, run, progress, plain_config, events, provenance)
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from llmtrain import json_lines
from llmtrain.config.training import MonitorConfig
from llmtrain.run.directory import RunDirectory
from llmtrain.run.progress import Progress
from llmtrain.train.events import Events
from llmtrain.train.metrics import Row, Sink
from llmtrain.train.monitor import Console, JsonLines
from llmtrain.train.tensorboard import tensorboard_sink
from llmtrain.train.tracker import wandb_sink

logger = logging.getLogger(__name__)


class Careful:
    """A sink whose failures are told once and end nothing but itself."""

    def __init__(self, sink: Sink, name: str, events: Events, so: str, *, lasts: bool = False):
        """Tell ``events`` that ``name`` failed, and ``so``; one that ``lasts`` is tried again."""
        self._sink = sink
        self._name = name
        self._events = events
        self._so = so
        self._lasts = lasts
        self._failed = False

    def write(self, row: Row) -> None:
        """Give the sink one row."""
        self.attempt(self._sink.write, row)

    def attempt(self, act: Callable[..., None], *args: object) -> None:
        """Have the sink ``act``, unless it has failed for good."""
        if self._failed and not self._lasts:
            return
        try:
            act(*args)
        except Exception as error:  # sinks of others raise what they like
            failed_before, self._failed = self._failed, True
            if not failed_before:
                text = f"{self._name} failed ({type(error).__name__}: {error}); {self._so}"
                logger.warning("%s", text)
                self._events.write("sink_failed", text)
        else:
            if self._failed:
                self._failed = False
                logger.info("%s is written again, and lacks no row", self._name)


def open_sinks(
    stack: ExitStack,
    config: MonitorConfig,
    run: RunDirectory,
    progress: Progress,
    plain_config: Mapping[str, Any],
    events: Events,
    provenance: Mapping[str, Any],
) -> list[Sink]:
    """Open all sinks of a run on ``stack``; those that lack rows of earlier starts get them."""
    lines = stack.enter_context(JsonLines(run.metrics_jsonl, progress.step))
    past = json_lines.read(run.metrics_jsonl)
    tracker = stack.enter_context(wandb_sink(config, run, plain_config))
    board = stack.enter_context(tensorboard_sink(config, run, progress.step))
    console = Console(progress.num_steps, progress.step, config.progress_bar)
    waits = "rows wait in memory until they can be written"
    sinks: list[Sink] = [
        Careful(lines, run.metrics_jsonl.name, events, waits, lasts=True),
        stack.enter_context(console),
    ]
    if tracker is not None:
        careful = Careful(
            tracker, "Weights & Biases", events,
            "this start sends no more to it, the next one what is missing",
        )  # fmt: skip
        careful.attempt(tracker.describe, provenance, run.config_yaml, run.environment_jsonl)
        careful.attempt(tracker.catch_up, past)
        events.listeners.append(partial(careful.attempt, tracker.alert))
        sinks.append(careful)
    if board is not None:
        sinks.append(Careful(board, "TensorBoard", events, "this start shows it no more rows"))
    return sinks
