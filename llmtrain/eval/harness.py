"""``llmtrain eval tasks=[...]``: tasks of lm-evaluation-harness on a run, as it is.

Results go to ``RUN/harness.json`` (and to the run's W&B record, where it has one), every question
and answer to ``RUN/harness_samples.jsonl`` where asked for. Tasks are the harness's own, which
download their data, or YAML files of ``harness.include_path`` with data beside them, which need no
network.

    llmtrain eval run=runs/demo tasks=[capitals] harness.include_path=tasks
"""

import importlib.util
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmtrain import json_lines
from llmtrain.config.generate import EvalConfig
from llmtrain.config.load import to_plain
from llmtrain.errors import ConfigError, DataError
from llmtrain.eval.trained import TrainedRun, opened_run
from llmtrain.run.directory import write_json
from llmtrain.train.tracker import wandb_sink

logger = logging.getLogger(__name__)

INSTALL = "pip install 'lm-eval>=0.4.13'"
RECORD = "harness"
"""Results are in ``harness.json`` of the run, samples in ``harness_samples.jsonl``."""
_KEPT = ("results", "groups", "n-shot", "versions", "higher_is_better", "n-samples")


def main(config: EvalConfig) -> int:
    """Run the tasks, write what they gave and print a table.

    Raises:
        ConfigError: lm_eval is not installed, or knows no such task.
    """
    require_harness(config.tasks)
    with opened_run(config.run, config.step, config.parallel.tp) as run:
        found = run_tasks(config, run, find_tasks(config))
        if run.rank == 0 and found is not None:
            _keep(config, run, found)
            sys.stdout.write(table(found["results"], found["n-shot"]))
    return 0


def require_harness(tasks: Sequence[str]) -> None:
    """Refuse tasks where the harness is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"tasks={list(tasks)} needs lm-evaluation-harness, which is not installed; "
            f"run {INSTALL}"
        )


def run_tasks(
    config: EvalConfig,
    run: TrainedRun,
    manager: Any,
    *,
    between: Callable[[], None] = lambda: None,
    moves: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Evaluate on every rank that shares the model; returns the results where the harness does.

    ``manager`` is what ``find_tasks`` found. ``between`` is called before every batch, on all ranks
    alike, and may raise; ``moves`` for every new token of an answer.

    Raises:
        DataError: the data of a task cannot be had.
    """
    import lm_eval

    from llmtrain.eval.harness_model import HarnessModel

    settings = config.harness
    model = HarnessModel(run, settings, between=between, moves=moves)
    with _explained(config):
        found: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=model, tasks=list(config.tasks), task_manager=manager,
            num_fewshot=settings.num_fewshot, limit=settings.limit, bootstrap_iters=1000,
            log_samples=settings.log_samples, apply_chat_template=settings.chat_template,
            system_instruction=settings.system, random_seed=settings.seed,
            numpy_random_seed=settings.seed, torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
        )  # fmt: skip
    return found


def load_data(config: EvalConfig, manager: Any) -> None:
    """Load the data of the tasks once, so that the harness has it at hand later.

    Raises:
        DataError: the data of a task cannot be had.
    """
    with _explained(config):
        manager.load(list(config.tasks))


@contextmanager
def _explained(config: EvalConfig) -> Iterator[None]:
    """Say it in a sentence where data is not there."""
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise DataError(
            f"the data of tasks={list(config.tasks)} cannot be had: "
            f"{' '.join(str(error).split())}; look at dataset_path and data_files of the task, or "
            "download the data where there is a network"
        ) from error


def find_tasks(config: EvalConfig) -> Any:
    """Find the tasks; those of a folder come before the harness's own.

    Raises:
        ConfigError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    folder = config.harness.include_path
    own = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if own is not None and set(config.tasks) <= set(own.all_tasks):
        return own  # the harness's own are thousands of files
    manager = TaskManager(include_path=folder)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            close = get_close_matches(name, manager.all_tasks, n=1)
            raise ConfigError(
                f"tasks has {name}, which lm-evaluation-harness {version('lm_eval')} does not "
                f"have{f' (it has {close[0]})' if close else ''}; name one of its tasks, or the "
                "folder of your own in harness.include_path"
            )
    return manager


def keep_record(path: Path, config: EvalConfig, step: int, found: Mapping[str, Any]) -> None:
    """Write results to ``path``.json, and samples that were asked for to ``path``_samples.jsonl."""
    record = {
        "step": step, "lm_eval": version("lm_eval"), "settings": to_plain(config.harness),
        **{name: found[name] for name in _KEPT if name in found},
    }  # fmt: skip
    write_json(path.with_name(f"{path.name}.json"), _plain(record))
    if config.harness.log_samples:
        rows = ({"task": task, **row} for task, each in found["samples"].items() for row in each)
        lines = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
        path.with_name(f"{path.name}_samples.jsonl").write_text(lines, encoding="utf-8")


def _keep(config: EvalConfig, run: TrainedRun, found: Mapping[str, Any]) -> None:
    """Write results and samples into the run folder, and numbers to W&B unless the run trains."""
    keep_record(run.directory.path / RECORD, config, run.step, found)
    with ExitStack() as stack:
        try:
            stack.enter_context(run.directory.locked())
        except ConfigError:  # the W&B record is that of the process which trains
            logger.warning("%s is training: results are in %s.json, not in its Weights & Biases "
                           "run", run.directory.path, RECORD)  # fmt: skip
            return
        tracker = stack.enter_context(
            wandb_sink(run.config.monitor, run.directory, to_plain(run.config))
        )
        if tracker is not None:
            tracker.catch_up(json_lines.read(run.directory.metrics_jsonl))
            tracker.summarize(numbers(found["results"]))


def numbers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Results as flat numbers, ``harness/TASK/METRIC``; filters other than "none" in brackets."""
    flat = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and "," in name:
                metric, _, kind = name.partition(",")
                flat[f"harness/{task}/{metric}{'' if kind == 'none' else f'[{kind}]'}"] = value
    return flat


def table(results: Mapping[str, Mapping[str, Any]], shots: Mapping[str, int]) -> str:
    """Lay results out, one metric a line, with its standard error where there is one."""
    lines = [f"{'task':<24}{'shots':>6}  {'metric':<28}{'value':>12}{'stderr':>12}"]
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or not kind or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            label = metric if kind == "none" else f"{metric} ({kind})"
            lines.append(f"{task:<24}{shots.get(task, 0):>6}  {label:<28}{value:>12.4f}{shown:>12}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """Copy with JSON's own types: what the harness returns has numpy's numbers and functions."""
    return json.loads(
        json.dumps(value, default=lambda x: x.item() if hasattr(x, "item") else str(x))
    )
