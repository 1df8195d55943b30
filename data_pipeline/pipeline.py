"""The whole pipeline: raw files to token stores, stage after stage, each one finished or repeated.

``OUT/pipeline.json`` holds the settings the folder was begun with; another setting is refused, and
a finished stage is never made twice. The same command after any kind of death goes on.

    run_pipeline(config, context)   # or: llmtrain-data run pipeline=demo input.web=crawl out=OUT
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.config.run import PipelineConfig, RunConfig
from data_pipeline.dedup.earlier import earlier_keys
from data_pipeline.dedup.stages import KEYED
from data_pipeline.folder import claim, fingerprints
from data_pipeline.jobs import shard_inputs, shard_jobs
from data_pipeline.manifest import Manifest, TaskResult
from data_pipeline.read.extract_task import check_unique, extract_file, extract_settings
from data_pipeline.read.inputs import RawFile, file_inputs, find_raw_files
from data_pipeline.report.funnel import FunnelRow, make_rows, render, summarise, write_funnel
from data_pipeline.shards import Shard, read_table
from data_pipeline.stages import Context, Stage, exclusive
from data_pipeline.steps import STEPS, step_settings, step_spec
from data_pipeline.tokens.split import route, split_of
from data_pipeline.tokens.stores import StoreJob, clear, sample_of_shards, withdraw
from data_pipeline.tokens.tokenize import group_shards, tokenize_shards
from data_pipeline.tokens.tokenizer_training import (
    train_tokenizer,
    training_settings,
    within_memory,
)
from data_pipeline.transform import apply_steps, merge_steps, step_seconds
from llmtrain.config.load import config_hash
from llmtrain.errors import DataError
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

logger = logging.getLogger(__name__)


class Pipeline:
    """Runs the stages of one configuration in one folder."""

    def __init__(self, config: PipelineConfig, context: Context) -> None:
        """Nothing is read or written before ``run``."""
        self.config = config
        self.context = context
        self.rows: list[FunnelRow] = []
        self._number = 0
        self.memory_bytes = int(config.memory_gib * 2**30)

    def run(self, files: Sequence[RawFile]) -> list[FunnelRow]:
        """Run every stage that is not finished; return the funnel."""
        shards = self._extract(files)
        self._check_left(shards)
        for names in passes(self.config):
            if names[0] in STEPS:
                shards = self._steps(names, shards)
            else:
                shards = KEYED[names[0]](self, names[0], shards)
            self._check_left(shards)
        shards = self._split(shards)
        self._warn_of_gone(files, shards)
        tokenizer = self._tokenizer(shards)
        self._tokenize(shards, tokenizer)
        return self.rows

    def _check_left(self, shards: Sequence[Shard]) -> None:
        """Raise DataError if the last stage left nothing."""
        if not shards:
            row = self.rows[-1]
            reasons = {**row.dropped, **row.quarantined}
            found = ", ".join(f"{reason} {number:,}" for reason, number in reasons.items())
            raise DataError(
                f"no document is left after {row.stage}: {row.documents_in:,} came in"
                f"{f', left out by reason: {found}' if found else ''}; give other input or "
                "loosen the rules"
            )

    def _warn_of_gone(self, files: Sequence[RawFile], shards: Sequence[Shard]) -> None:
        """Name the sources that have no store of training documents."""
        left = {shard.source for shard in shards if split_of(shard) == "train"}
        for source in sorted({file.source for file in files} - left):
            logger.warning("source %s has no document left to train on; it gets no store", source)

    def stage(
        self, name: str, settings: dict[str, Any], inputs: list[dict[str, Any]], target: str = ""
    ) -> Stage:
        """Return the next stage of the pipeline; ``target`` is a folder below ``out``."""
        numbered = f"{self._number:02d}-{name}"
        self._number += 1
        folder = self.context.out / target if target else None
        return Stage(self.context, numbered, settings, inputs, folder)

    def _note(self, stage: Stage, manifest: Manifest) -> None:
        """Add the stage to the funnel, the steps of a pass one by one."""
        rows = make_rows(manifest, stage.timing())
        self.rows += rows
        for row in rows:
            logger.info("%s", summarise(row))

    def _extract(self, files: Sequence[RawFile]) -> list[Shard]:
        settings = extract_settings(self.config.extract, self.config.fields)
        stage = self.stage("extract", settings, file_inputs(files))
        manifest = stage.finished()
        if manifest is None:
            common = {
                "stage": stage.name, "settings": self.config.extract, "fields": self.config.fields,
            }  # fmt: skip
            jobs = [({**common, "number": i, "file": f}, f.size) for i, f in enumerate(files)]
            results = stage.run("extract", extract_file, jobs)
            shards = [shard for result in results for shard in result.shards]
            out = self.context.out
            check_unique(
                (s.source, s.path, read_table(out, s, ["id"]).column("id").to_pylist())
                for s in shards
            )
            manifest = stage.finish(results)
        self._note(stage, manifest)
        return manifest.shards

    def _steps(self, names: Sequence[str], shards: Sequence[Shard]) -> list[Shard]:
        """Run neighbouring steps in one pass over the shards."""
        specs = [spec for name in names if (spec := step_spec(name, self.config)) is not None]
        settings = {name: step_settings(name, self.config) for name in names}
        stage = self.stage("+".join(names), settings, shard_inputs(shards))
        common = {"stage": stage.name, "out": str(self.context.out), "steps": specs}
        manifest = stage.finished()
        if manifest is None:
            results = stage.run("steps", apply_steps, shard_jobs(shards, common))
            details = merge_steps(
                [(shard.source, result.details["steps"])
                 for shard, result in zip(shards, results, strict=True)]
            )  # fmt: skip
            manifest = stage.finish(results, details, {"steps": step_seconds(results)})
        self._note(stage, manifest)
        return manifest.shards

    def _split(self, shards: Sequence[Shard]) -> list[Shard]:
        settings = asdict(self.config.split)
        stage = self.stage("split", settings, shard_inputs(shards))

        def work() -> tuple[list[TaskResult], dict[str, Any]]:
            common = {
                "stage": stage.name, "out": str(self.context.out), "key": self.config.split.key,
                "share": self.config.split.validation_share,
            }  # fmt: skip
            results = stage.run("route", route, shard_jobs(shards, common))
            routes = {
                split: sum(result.details[split] for result in results)
                for split in ("train", "validation")
            }
            return results, {"routes": routes}

        return self.finish(stage, work)

    def _tokenizer(self, shards: Sequence[Shard]) -> Path:
        """Return the folder of the tokenizer, trained if none is given."""
        settings = self.config.tokenizer
        if settings.path is not None:
            return Path(settings.path)
        train = [shard for shard in shards if split_of(shard) == "train"]
        settings = within_memory(settings, self.memory_bytes, sum(s.text_bytes for s in train))
        decisive = training_settings(settings)
        stage = self.stage("tokenizer", decisive, shard_inputs(train), target="tokenizer")
        if stage.finished() is None:
            job = {"out": str(self.context.out), "shards": train, "settings": settings}
            stage.finish(stage.run("train", train_tokenizer, [(job, 1)]))
        logger.info("%s: %.1f s", stage.name, stage.seconds())
        return self.context.out / "tokenizer"

    def _tokenize(self, shards: Sequence[Shard], folder: Path) -> None:
        job = StoreJob(
            tokenizer_path=str(folder), tokenizer=load_tokenizer(folder), config=self.config.store,
            memory_bytes=self.memory_bytes, pipeline_hash=config_hash(self.config),
        )  # fmt: skip
        stage = self.stage("tokenize", job.settings(), shard_inputs(shards), target="stores")
        manifest = stage.finished()
        if manifest is None:
            jobs = self._parts(shards)
            withdraw(stage, {arguments["store"] for arguments, _ in jobs})
            sample = sample_of_shards(self.context.out, shards)
            manifest = job.run(stage, tokenize_shards, jobs, sample)
        else:
            clear(stage)
        self._note(stage, manifest)

    def _parts(self, shards: Sequence[Shard]) -> list[tuple[dict[str, Any], int]]:
        stores: dict[str, list[Shard]] = {}
        for shard in shards:
            stores.setdefault(f"{split_of(shard)}/{shard.source}", []).append(shard)
        out = str(self.context.out)
        return [
            (
                {"out": out, "store": store, "index": i, "shards": group},
                sum(s.text_bytes for s in group),
            )
            for store, members in sorted(stores.items())
            for i, group in enumerate(group_shards(members, self.config.store.part_bytes))
        ]

    def finish(
        self, stage: Stage, work: Callable[[], tuple[list[TaskResult], dict[str, Any]]]
    ) -> list[Shard]:
        """Run the stage unless it is finished; return its documents."""
        manifest = stage.finished()
        if manifest is None:
            results, details = work()
            manifest = stage.finish(results, details)
        self._note(stage, manifest)
        return manifest.shards


def passes(config: PipelineConfig) -> list[tuple[str, ...]]:
    """Return the stages that are not skipped; neighbouring steps are one pass over the shards."""
    groups: list[tuple[str, ...]] = []
    for name in config.stages:
        if name in config.skip:
            continue
        if groups and name in STEPS and groups[-1][0] in STEPS:
            groups[-1] = (*groups[-1], name)
        else:
            groups.append((name,))
    return groups


def run_pipeline(config: RunConfig, context: Context) -> list[FunnelRow]:
    """Run the pipeline of ``config`` in ``context.out``; write and return the funnel.

    Raises:
        ConfigError: the folder was begun with other settings.
        DataError: an input is missing, unreadable or has changed.
    """
    files = find_raw_files(config.input)
    _check_needs(config.pipeline)
    out = context.out
    with exclusive(out):
        claim(out, config)
        rows = Pipeline(config.pipeline, context).run(fingerprints(out, files))
        write_funnel(out, rows)
    logger.info("%s", render(rows))
    return rows


def _check_needs(config: PipelineConfig) -> None:
    """Open what the last stages need, so that a wrong path ends the run before it begins."""
    if config.tokenizer.path is not None:
        load_tokenizer(config.tokenizer.path)
    else:
        training_settings(config.tokenizer)
    for names in passes(config):
        for name in names:
            if name in STEPS:
                step_settings(name, config)
            else:
                earlier_keys(getattr(getattr(config, name, None), "against", None), name, {})
