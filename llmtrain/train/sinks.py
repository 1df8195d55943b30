"""Opens every place the rows of a run go to, in the order they are told.

Invariant: ``metrics.jsonl`` has a row before anything else is told of it.

    sinks = open_sinks(stack, config.monitor, run, progress, plain_config, events, provenance)
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from llmtrain import json_lines
from llmtrain.config.training import MonitorConfig
from llmtrain.train.events import Events
from llmtrain.train.metrics import Sink
from llmtrain.train.monitor import Console, JsonLines
from llmtrain.train.progress import Progress
from llmtrain.train.rundir import RunDirectory
from llmtrain.train.tensorboard import tensorboard_sink
from llmtrain.train.tracker import wandb_sink


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
    sinks: list[Sink] = [lines, stack.enter_context(console)]
    if tracker is not None:
        tracker.describe(provenance, run.config_yaml, run.environment_jsonl)
        tracker.catch_up(past)
        events.listeners.append(tracker.alert)
        sinks.append(tracker)
    if board is not None:
        sinks.append(board)
    return sinks
