"""Weights & Biases: one run with one history for the life of a run, offline unless logged in.

``metrics.jsonl`` is the truth and W&B a reader of it. wandb 0.31 cannot resume an offline run: each
process leaves a record of its own under the same id, and ``wandb sync`` of one replaces what it
uploaded of another. So every start first logs again all rows the record does not have: a new
offline record holds the history from step 1 on, and older records move to ``wandb/superseded``,
where ``wandb sync RUN/wandb`` does not look. Online the server keeps the first row of a step, and
what it has cannot be taken back: rows after a rollback are further lines of the history, in which
``train_step`` begins again at the checkpoint and ``attempt`` tells them from those that are undone.

wandb is optional: asked for and missing is an error with the command to install it; not asked for
and missing is one log line.

    with wandb_sink(config.monitor, run, plain_config) as tracker:   # None where it is off
        tracker.catch_up(json_lines.read(run.metrics_jsonl))
        tracker.write(row)
"""

import importlib.util
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llmtrain import json_lines
from llmtrain.config.training import MonitorConfig
from llmtrain.errors import ConfigError
from llmtrain.run.directory import RunDirectory
from llmtrain.train.events import Kind
from llmtrain.train.metrics import Row

Mode = Literal["online", "offline", "disabled"]

logger = logging.getLogger(__name__)

INSTALL = "pip install 'wandb>=0.31'"
ALERTS: dict[Kind, str] = {
    "spike": "WARN", "rollback": "WARN", "hang": "ERROR", "out_of_memory": "ERROR",
    "save_failed": "ERROR",
}  # fmt: skip
"""Events that alert, and how grave they are to W&B."""
SUPERSEDED = "superseded"
"""Folder of offline records whose rows a later one holds."""
FILES = "llmtrain"
"""Folder of our files among those of the W&B run."""
FINISH_S = 20.0
"""How long the end of a run waits for the server to take what it has not yet."""
_FLUSH_S = 2.0
_NO_NUMBERS = ("step", "num_steps", "time")


def check_tracker(config: MonitorConfig) -> None:
    """Raise ConfigError when wandb, asked for by name, is not installed or refuses the names."""
    if config.wandb not in ("online", "offline"):
        return
    if not _installed():
        raise ConfigError(
            f"monitor.wandb={config.wandb} needs wandb, which is not installed; run {INSTALL} or "
            "use monitor.wandb=disabled"
        )
    import wandb

    try:
        wandb.Settings(project=config.wandb_project, run_group=config.wandb_group)
    except wandb.errors.UsageError as error:
        raise ConfigError(
            f"Weights & Biases refuses monitor.wandb_project={config.wandb_project} or "
            f"monitor.wandb_group={config.wandb_group}: {error}; use another name"
        ) from None


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


class Undone(NamedTuple):
    """Steps that a rollback took back."""

    attempt: int
    """Start of the run that had made them."""
    num_steps: int
    """How many they were."""


def undone_steps(events: Iterable[Mapping[str, Any]]) -> list[Undone]:
    """Read from the events of a run what was taken back."""
    return [
        Undone(event["attempt"], event["reached"] - event["to_step"])
        for event in events
        if event["kind"] == "rollback"
    ]


class Tracker:
    """Sends rows, events and files to one W&B run."""

    def __init__(self, run: Any, undone: Sequence[Undone] = ()) -> None:
        """Take the run that ``wandb.init`` gave; its record may hold steps that are ``undone``."""
        self._run = run
        self._undone = tuple(undone)
        self._first_step = run.starting_step
        run.define_metric("train_step")
        run.define_metric("attempt", step_metric="train_step")
        run.define_metric("*", step_metric="train_step")

    def catch_up(self, rows: Iterable[Row]) -> None:
        """Log the rows of the run so far that its record lacks."""
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """Log one row; numbers by source, layer or rank become ``source_loss/NAME`` and so on.

        A step that the record has already is left out: of steps run again the first row stays.
        """
        line = row["step"] + sum(
            one.num_steps for one in self._undone if one.attempt < row.get("attempt", 1)
        )
        if line >= self._first_step:
            self._run.log({**flat(row), "_timestamp": row["time"]}, step=line)

    def summarize(self, numbers: Mapping[str, float]) -> None:
        """Put numbers about the run as a whole into its summary."""
        self._run.summary.update(dict(numbers))

    def alert(self, kind: Kind, text: str) -> None:
        """Alert of an event, where it is one to alert of."""
        if kind in ALERTS:
            name = f"{self._run.name}: {kind.replace('_', ' ')}"
            self._run.alert(title=name, text=text, level=ALERTS[kind])

    def describe(self, found: Mapping[str, Any], *files: Path) -> None:
        """Put what the run is made of into its config, and copies of ``files`` beside it.

        Copies, because W&B would link them, and writes files of its own through such links.
        """
        self._run.config.update({"provenance": dict(found)}, allow_val_change=True)
        for file in files:
            kept = Path(self._run.dir) / FILES / file.name
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, kept)
            self._run.save(str(kept), base_path=self._run.dir, policy="now")


def flat(row: Row) -> dict[str, float]:
    """Numbers of a row by flat name, with ``train_step``; text and null are left out."""
    numbers: dict[str, float] = {"train_step": row["step"]}
    for name, value in row.items():
        parts = value if isinstance(value, Mapping) else {None: value}
        for part, number in parts.items():
            if isinstance(number, int | float) and name not in _NO_NUMBERS:
                numbers[name if part is None else f"{name}/{part}"] = number
    return numbers


@contextmanager
def wandb_sink(
    config: MonitorConfig, run: RunDirectory, plain_config: Mapping[str, Any]
) -> Iterator[Tracker | None]:
    """Open the W&B run whose id is in ``run.json`` (made at the first start); None where it is off.

    An online run that cannot reach the server goes on offline, one whose record or service cannot
    be opened without it; leaving the block takes ``FINISH_S`` at most. The run has a service of its
    own: that of a parent (a sweep agent) would hold the id of a killed start and refuse the next.
    """
    os.environ.pop("WANDB_SERVICE", None)  # noqa: TID251
    opened = None
    try:
        opened = _begin(config, run, plain_config)
    except Exception as error:  # no report ends a run: wandb raises what it likes
        logger.warning("Weights & Biases: off (%s: %s)", type(error).__name__, error)
    if opened is None:
        yield None
        return
    status = 1
    try:
        undone = [] if opened.offline else undone_steps(json_lines.read(run.events_jsonl))
        yield Tracker(opened, undone)
        status = 0
    finally:
        _finish(opened, status)


def _begin(config: MonitorConfig, run: RunDirectory, plain_config: Mapping[str, Any]) -> Any:
    """Open the W&B run and say which it is; None where none is wanted."""
    mode, why = choose_mode(config)
    if mode == "disabled":
        logger.info("Weights & Biases: off (%s)", why)
        return None
    record = run.record(wandb_id=_given_id() or secrets.token_hex(4))
    _set_aside(run.path / "wandb")
    opened = _open(config, run, record, plain_config, mode)
    logger.info(
        "Weights & Biases: run %s, %s (%s)%s",
        record["wandb_id"], "offline" if opened.offline else "online", why,
        f"; wandb sync {opened.dir.removesuffix('/files')} uploads it" if opened.offline else "",
    )  # fmt: skip
    return opened


def _finish(opened: Any, status: int) -> None:
    """End the W&B run; a failure is told, and what it keeps from the server is on the disk."""
    import wandb

    try:
        opened.finish(exit_code=status)
    except TimeoutError:
        logger.warning(
            "Weights & Biases has not taken everything in %.0f s; the next start of this run sends "
            "what is missing, or now: wandb sync --no-skip-online %s",
            FINISH_S, opened.dir.removesuffix("/files"),
        )  # fmt: skip
    except Exception as error:  # a report must not end a run: wandb raises what it likes
        logger.warning("Weights & Biases was not told of the end (%r)", error)
        with suppress(Exception):
            wandb.teardown()  # the next one has a service that answers


def _set_aside(folder: Path) -> None:
    """Move the offline records of earlier starts to where ``wandb sync`` does not find them."""
    for old in sorted(folder.glob("offline-run-*")):
        kept = folder / SUPERSEDED / old.name
        kept.parent.mkdir(exist_ok=True)
        old.rename(kept)


def _given_id() -> str | None:
    """Id that a sweep agent of W&B has given this run (WANDB_RUN_ID)."""
    import wandb

    given: str | None = wandb.setup(wandb.Settings(silent=True)).settings.run_id
    return given


def _group(config: MonitorConfig, run: RunDirectory) -> str | None:
    """Group of a run: as configured, else the sweep it is a trial of."""
    sweep = run.path.resolve().parent
    if config.wandb_group is None and (sweep / "sweep.json").exists():
        return sweep.name
    return config.wandb_group


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
            group=_group(config, run),
            job_type="train",
            name=record.get("name", run.path.name),
            id=record["wandb_id"],
            resume="allow" if mode == "online" else None,
            dir=run.path,
            config=dict(plain_config),
            mode=mode,
            settings=wandb.Settings(
                silent=True, console="off", init_timeout=30,
                finish_timeout=FINISH_S, finish_timeout_raises=True,
                x_transaction_log_flush_interval=_FLUSH_S,  # what a killed process may lose
            ),
        )  # fmt: skip

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
