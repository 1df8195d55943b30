"""A run as its folder tells it: the batch plan, how far it is, over how many ranks it is spread.

Works from ``config.yaml``, ``journal.json``, the token stores and the small JSON files of the run;
no weights are read and no torch is imported. Stores that changed since are refused: the batches
that were computed from them are not those of the run.

    run = open_run(TraceConfig(run="runs/demo", step=12))
    run.plan.windows(11)
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtrain import json_lines
from llmtrain.checkpoint import archive
from llmtrain.checkpoint.facts import changed_facts, data_facts
from llmtrain.config.load import build, from_yaml
from llmtrain.config.parallel import implied_world_size, microbatches_per_rank
from llmtrain.config.run import RunConfig
from llmtrain.config.trace import TraceConfig
from llmtrain.data.journal import Journal, from_plain, read_journal
from llmtrain.data.manifest import MANIFEST
from llmtrain.data.plan import BatchPlan, plan_of
from llmtrain.data.store import TokenStore, open_source
from llmtrain.data.trace import Rows
from llmtrain.errors import ConfigError, DataError
from llmtrain.run.directory import RunDirectory, read_json
from llmtrain.tokenizer.tokenizer import Tokenizer, load


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRun:
    """A run whose batches can be told."""

    directory: RunDirectory
    """Its folder."""
    config: RunConfig
    """What it was trained with last."""
    plan: BatchPlan
    """Its batches."""
    tokenizer: Tokenizer | None
    """Its tokenizer, where one is known."""
    done: int
    """Steps it has done."""
    first: int
    """0-based step from which on the stores are those of today."""
    dp_size: int | None
    """Data-parallel ranks, where known."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.training.num_steps

    def decided(self, last: int) -> int:
        """Return how many of the first ``last`` steps an adaptive mixture has decided on."""
        return bisect_left(range(last), True, key=lambda step: not self.plan.knows(step))

    def rows_per_rank(self, shape: Rows) -> int | None:
        """Rows that each data-parallel rank takes of a step, padding of the last ones included."""
        if self.dp_size is None:
            return None
        size = self.config.training.micro_batch_size
        units = shape.num_rows // shape.rows_per_unit
        count = microbatches_per_rank(self.config.parallel, units, self.dp_size, size)
        return count * size * shape.rows_per_unit

    def store(self, source: int) -> TokenStore:
        """Return the store of a source of the plan."""
        return self.plan.orders[source].store

    def has_records(self, source: int, document: int) -> bool:
        """Whether the store of a document, one of several where joined, keeps where it is from."""
        return has_records(self.store(source), document)


def has_records(store: TokenStore, document: int) -> bool:
    """Whether the records of a document's store are kept; those of other programs have none."""
    return store.folder_of(document).has(MANIFEST)


def open_run(asked: TraceConfig) -> TracedRun:
    """Open the run that ``asked`` names.

    Raises:
        ConfigError: there is no run, or a source or tokenizer that is asked for is none of its.
        DataError: a store or the tokenizer is missing or is not what the run was trained on.
    """
    directory = RunDirectory(Path(asked.run))
    if not directory.config_yaml.is_file():
        raise ConfigError(
            f"{asked.run} is not a run folder: it has no config.yaml; give the folder that "
            "`llmtrain train` made, such as runs/NAME"
        )
    try:
        tree = from_yaml(directory.config_yaml.read_text(encoding="utf-8"))
        trained = build(RunConfig, tree)
    except ConfigError as error:
        raise ConfigError([f"{directory.config_yaml}: {line}" for line in error.problems]) from None
    config = _moved(trained, asked)
    stores = {name: _open(name, config) for name in sorted(config.data.sources)}
    journal, undone = _journal(directory, asked.attempt)
    plan = plan_of(config, stores, journal)
    saved = _newest(directory)
    _check_unchanged(directory, plan, saved)
    return TracedRun(
        directory=directory, config=config, plan=plan, tokenizer=_tokenizer(config, stores),
        done=max(_steps_done(directory, saved), undone),
        first=max((entry.step for entry in plan.journal.accepted), default=0),
        dp_size=asked.dp_size or _dp_size(config, saved),
    )  # fmt: skip


def _journal(directory: RunDirectory, attempt: int | None) -> tuple[Journal | None, int]:
    """The journal by which an attempt read its batches, and the last step it did.

    An attempt after which the run never went back read by the journal of the run.
    """
    for event in json_lines.read(directory.events_jsonl) if attempt is not None else ():
        if event["kind"] == "rollback" and event["attempt"] >= attempt:
            return from_plain(event["journal"]), int(event["reached"])
    exists = directory.journal_json.exists()
    return (read_journal(directory.journal_json) if exists else None), 0


def _moved(config: RunConfig, asked: TraceConfig) -> RunConfig:
    """The run's configuration with today's places of stores and tokenizer."""
    unknown = sorted(set(asked.sources) - set(config.data.sources))
    if unknown:
        raise ConfigError(
            f"sources.{unknown[0]} is no source of the run; its sources are "
            f"{', '.join(sorted(config.data.sources))}"
        )
    sources = {**config.data.sources, **asked.sources}
    tokenizer = config.tokenizer
    if asked.tokenizer is not None:
        tokenizer = replace(tokenizer, path=asked.tokenizer)
    return replace(config, data=replace(config.data, sources=sources), tokenizer=tokenizer)


def _open(name: str, config: RunConfig) -> TokenStore:
    try:
        return open_source(config.data.sources[name], config.data.cache_dir)
    except DataError as error:
        raise DataError(
            f"data.sources.{name}: {error}; if the store was moved, give sources.{name}=DIR"
        ) from None


def _tokenizer(config: RunConfig, stores: Mapping[str, TokenStore]) -> Tokenizer | None:
    if config.tokenizer.path is None:
        return None
    try:
        tokenizer = load(config.tokenizer.path)
    except DataError as error:
        raise DataError(f"{error}; if the tokenizer was moved, give tokenizer=DIR") from None
    for store in stores.values():
        store.check_tokenizer(tokenizer.hash)
    return tokenizer


def _newest(directory: RunDirectory) -> dict[str, Any]:
    """What the newest checkpoint says of itself; empty where there is none."""
    for _, path in archive.scan(directory.checkpoints):
        if (path / archive.META).is_file():
            return read_json(path / archive.META)
    return {}


def _check_unchanged(directory: RunDirectory, plan: BatchPlan, saved: Mapping[str, Any]) -> None:
    """Refuse stores or settings that are not those of the newest checkpoint."""
    accepted = max((entry.step for entry in plan.journal.accepted), default=-1)
    if not saved or accepted >= int(saved["step"]):
        return
    if changed := changed_facts(saved["facts"], data_facts(plan)):
        raise DataError(
            f"the batches of {directory.path} were others: since step {saved['step']}, "
            f"{'; '.join(changed)}; put these back, the batches cannot be told without"
        )


def _steps_done(directory: RunDirectory, saved: Mapping[str, Any]) -> int:
    """Steps the run has done, as far as any of its files says."""
    steps = [int(saved.get("step", 0))]
    if directory.status_json.is_file():
        steps.append(int(read_json(directory.status_json).get("step", 0)))
    if directory.metrics_jsonl.is_file():
        steps.append(_last_logged(directory.metrics_jsonl))
    return max(steps)


def _last_logged(path: Path) -> int:
    """Step of the last whole line of the metrics."""
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            row: dict[str, Any] = json.loads(line)
            return int(row["step"])
        except (ValueError, KeyError):  # still being written
            continue
    return 0


def _dp_size(config: RunConfig, saved: Mapping[str, Any]) -> int | None:
    """Data-parallel ranks of the newest checkpoint's world, or of a layout that says all."""
    parallel = config.parallel
    if world_size := saved.get("world_size"):
        return max(1, int(world_size) // (parallel.pp * parallel.cp * parallel.tp))
    if parallel.elastic:
        return None
    return implied_world_size(parallel) // (parallel.pp * parallel.cp * parallel.tp)
