"""Weights & Biases: the same run id for the life of a run, offline unless logged in.

``train_step`` is the x axis of every chart. wandb is optional: asked for and missing is an error
with the command to install it; not asked for and missing is one log line.

    with wandb_sink(config.monitor, run, plain_config) as tracker:   # None where it is off
        tracker.write(row)
"""

import importlib.util
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from llmtrain.config.training import MonitorConfig
from llmtrain.errors import ConfigError
from llmtrain.train.metrics import Row, Sink
from llmtrain.train.monitor import Console, JsonLines
from llmtrain.train.progress import Progress
from llmtrain.train.rundir import RunDirectory

Mode = Literal["online", "offline", "disabled"]

logger = logging.getLogger(__name__)

INSTALL = "pip install 'wandb>=0.31'"


def check_installed(config: MonitorConfig) -> None:
    """Raise ConfigError when wandb is asked for by name and is not installed."""
    if config.wandb in ("online", "offline") and not _installed():
        raise ConfigError(
            f"monitor.wandb={config.wandb} needs wandb, which is not installed; run {INSTALL} or "
            "use monitor.wandb=disabled"
        )


def choose_mode(config: MonitorConfig) -> tuple[Mode, str]:
    """What ``monitor.wandb`` comes to here, and why."""
    if config.wandb != "auto":
        return config.wandb, "monitor.wandb asks for it"
    if not _installed():
        return "disabled", f"wandb is not installed; {INSTALL} turns it on"
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    if wandb.login(prompt=False, verify=False):
        return "online", "logged in"
    return "offline", "not logged in; wandb login makes later runs online"


class Tracker:
    """Sends rows to one W&B run."""

    def __init__(self, run: Any) -> None:
        """Take the run that ``wandb.init`` gave."""
        self._run = run
        run.define_metric("train_step")
        run.define_metric("*", step_metric="train_step")

    def write(self, row: Row) -> None:
        """Log one row; numbers by source become ``source_loss/NAME``.

        A step that is run again after a resume is the same step: W&B keeps the first row of it.
        """
        self._run.log(flat(row), step=row["step"])


def flat(row: Row) -> dict[str, float]:
    """Numbers of a row by flat name, with ``train_step``; text and null are left out."""
    numbers: dict[str, float] = {"train_step": row["step"]}
    for name, value in row.items():
        parts = value if isinstance(value, Mapping) else {None: value}
        for part, number in parts.items():
            if isinstance(number, int | float) and name not in ("step", "num_steps", "time"):
                numbers[name if part is None else f"{name}/{part}"] = number
    return numbers


@contextmanager
def wandb_sink(
    config: MonitorConfig, run: RunDirectory, plain_config: Mapping[str, Any]
) -> Iterator[Tracker | None]:
    """Open the W&B run whose id is in ``run.json`` (made at the first start); None where it is off.

    An online run that cannot reach the server goes on offline.
    """
    mode, why = choose_mode(config)
    if mode == "disabled":
        logger.info("Weights & Biases: off (%s)", why)
        yield None
        return
    record = run.record(wandb_id=secrets.token_hex(4))
    opened = _open(config, run, record, plain_config, mode)
    logger.info(
        "Weights & Biases: run %s, %s (%s)%s",
        record["wandb_id"], "offline" if opened.offline else "online", why,
        f"; wandb sync {opened.dir.removesuffix('/files')} uploads it" if opened.offline else "",
    )  # fmt: skip
    status = 1
    try:
        yield Tracker(opened)
        status = 0
    finally:
        opened.finish(exit_code=status)


def open_sinks(
    stack: ExitStack,
    config: MonitorConfig,
    run: RunDirectory,
    progress: Progress,
    plain_config: Mapping[str, Any],
) -> list[Sink]:
    """Open all sinks of a run on ``stack``: metrics.jsonl first, then the console, then W&B."""
    tracker = stack.enter_context(wandb_sink(config, run, plain_config))
    sinks: list[Sink] = [
        stack.enter_context(JsonLines(run.metrics_jsonl, progress.step)),
        stack.enter_context(Console(progress.num_steps, progress.step, config.progress_bar)),
    ]
    return sinks if tracker is None else [*sinks, tracker]


def _open(
    config: MonitorConfig,
    run: RunDirectory,
    record: Mapping[str, Any],
    plain_config: Mapping[str, Any],
    mode: Mode,
) -> Any:
    import wandb

    def start(mode: Mode) -> Any:
        return wandb.init(
            project=config.wandb_project,
            group=config.wandb_group,
            name=record.get("name", run.path.name),
            id=record["wandb_id"],
            resume="allow" if mode == "online" else None,
            dir=run.path,
            config=dict(plain_config),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )

    if mode == "offline":
        return start("offline")
    try:
        return start("online")
    except wandb.errors.CommError as error:
        cause = str(error).splitlines()[0]
        logger.warning("Weights & Biases cannot be reached (%s); going on offline", cause)
        wandb.teardown()  # the half-open run holds its id
        return start("offline")


def _installed() -> bool:
    return importlib.util.find_spec("wandb") is not None
