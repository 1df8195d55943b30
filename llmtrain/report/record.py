"""What a finished or running run left on disk, read for its report; imports no torch.

Everything but ``config.yaml`` and ``metrics.jsonl`` may be missing: a report can be made of a run
that still trains, was never evaluated or got its tokens elsewhere.

    record = read_run(Path("runs/demo"), data=None)
    record.rows.last["loss"]
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain import json_lines
from llmtrain.config.load import build, from_yaml
from llmtrain.config.mixture import AdaptiveMixture
from llmtrain.config.run import RunConfig
from llmtrain.data.manifest import read_manifest
from llmtrain.data.shares import share_schedule
from llmtrain.errors import ConfigError, LLMTrainError
from llmtrain.report.columns import Columns, Row, read_columns
from llmtrain.report.series import step_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run as its files tell it."""

    path: Path
    """Run folder."""
    config: RunConfig
    """What it was trained with."""
    rows: Columns
    """Rows of ``metrics.jsonl`` in order of steps; at least one."""
    status: Row
    """``status.json``: code, reason, step; empty while it trains."""
    resumed: list[int]
    """Steps the run was continued from, as its log tells."""
    events: list[Row]
    """Lines of ``events.jsonl``: time, step, attempt, kind, text; empty where there are none."""
    evaluation: Row
    """``eval.json``; empty if it was never evaluated."""
    samples: list[Row]
    """From ``samples.json``: prompt, completion and how it was sampled."""
    funnel: list[Row]
    """Stages of the data pipeline; empty if unknown."""
    planned: dict[str, float]
    """Planned share of the training tokens by source."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.name or self.path.resolve().name

    def color(self, source: str) -> int:
        """Number of a source's color, the same all over the page; 0 stands for all together."""
        names = list(self.config.data.sources)
        return 1 + (names.index(source) if source in names else len(names))

    def realised(self) -> dict[str, int]:
        """Target tokens the run has trained on, by source."""
        key = "source_tokens"
        return {name: int(np.nansum(self.rows.inside(key, name))) for name in self.rows.names(key)}

    def trained_s(self) -> float:
        """Seconds spent in training steps."""
        return float(step_seconds(self.rows).sum())


def read_run(path: Path, data: Path | None) -> RunRecord:
    """Read a run folder; ``data`` is the data pipeline's output, found beside the stores if None.

    Raises:
        ConfigError: the folder holds no run, or nothing has been logged yet.
    """
    config = build(RunConfig, read_tree(path))
    rows = read_rows(path)
    return RunRecord(
        path=path,
        config=config,
        rows=rows,
        status=read_json(path / "status.json", {}),
        resumed=_resumed(path / "logs" / "rank0.log"),
        events=[
            {"step": 0, **event}
            for event in json_lines.read(path / "events.jsonl")
            if "kind" in event
        ],
        evaluation=read_json(path / "eval.json", {}),
        samples=read_json(path / "samples.json", {}).get("samples", []),
        funnel=_funnel(config, data),
        planned=_planned(config),
    )


def read_tree(path: Path) -> Row:
    """The run's ``config.yaml`` as a plain tree.

    Raises:
        ConfigError: the folder holds no run.
    """
    config_path = path / "config.yaml"
    if not config_path.is_file():
        raise ConfigError(f"{path} holds no config.yaml; give run= a folder llmtrain train wrote")
    return from_yaml(config_path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> Columns:
    """Rows of the run's ``metrics.jsonl``.

    Raises:
        ConfigError: there are none yet.
    """
    rows = read_columns(path / "metrics.jsonl")
    if not rows.num_rows:
        raise ConfigError(
            f"{path / 'metrics.jsonl'} holds no step yet; train at least to a logging step"
        )
    return rows


def read_json(path: Path, empty: Any) -> Any:
    """Content of a JSON file, ``empty`` where there is none.

    Raises:
        ConfigError: the file is no JSON.
    """
    if not path.is_file():
        return empty
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); delete it or make it again") from error


def _resumed(log: Path) -> list[int]:
    """Steps of the checkpoints that later starts went on from."""
    if not log.is_file():
        return []
    text = log.read_text(encoding="utf-8", errors="replace")
    return [int(step) for step in re.findall(r"resumed from \S*step-0*(\d+)", text)]


def _funnel(config: RunConfig, data: Path | None) -> list[Row]:
    """Stages of the pipeline, from ``data`` or from where the run's stores were made."""
    if data is not None:
        path = data / "funnel.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; give data= a folder llmtrain-data run wrote")
        return list(read_json(path, {})["stages"])
    # llmtrain-data writes OUT/funnel.json and OUT/stores/train/SOURCE.
    for at in config.data.sources.values():
        store = at if isinstance(at, str) else at[0]
        path = Path(store).parent.parent.parent / "funnel.json"
        if path.is_file():
            return list(read_json(path, {}).get("stages", []))
    return []


def _planned(config: RunConfig) -> dict[str, float]:
    """Planned share of each source over the whole run; an adaptive mixture plans none."""
    length, total = config.training.sequence_length, config.training.num_tokens
    if isinstance(config.mixture, AdaptiveMixture):
        return {}
    try:
        windows = {
            name: max(_num_tokens(stores) // length, 1)
            for name, stores in config.data.sources.items()
        }
        schedule = share_schedule(config.mixture, windows, unit_tokens=length, num_tokens=total)
    except LLMTrainError:
        return {}  # moved since, or written by another program
    num_units = -(-total // length)
    targets = zip(sorted(windows), schedule.integral(num_units), strict=True)
    return {name: float(target / num_units) for name, target in targets}


def _num_tokens(paths: str | Sequence[str]) -> int:
    """Tokens of the stores of one source."""
    stores = [paths] if isinstance(paths, str) else paths
    return sum(read_manifest(Path(store)).num_tokens for store in stores)
