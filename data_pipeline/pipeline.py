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

from data_pipeline.cluster import emit_bands, find_clusters, keep_longest, reduce_bands
from data_pipeline.config import PipelineConfig, RunConfig
from data_pipeline.dedup import (
    RECORD,
    drop_documents,
    drop_lines,
    emit_keys,
    num_buckets,
    reduce_keys,
)
from data_pipeline.filters.c4 import read_bad_words
from data_pipeline.folder import claim, fingerprints
from data_pipeline.io import RawFile, file_inputs, find_raw_files
from data_pipeline.language import identifier_version
from data_pipeline.manifest import Manifest, TaskResult
from data_pipeline.report import FunnelRow, make_row, render, summarise, write_funnel
from data_pipeline.shards import Shard, read_table
from data_pipeline.split import route, split_of
from data_pipeline.stages import Context, Stage, exclusive
from data_pipeline.steps import step_settings, step_specs
from data_pipeline.tokenize import (
    group_shards,
    publish,
    tokenize_shards,
    train_tokenizer,
    withdraw,
)
from data_pipeline.transform import apply_steps, check_unique, extract_file
from llmtrain.config.load import config_hash
from llmtrain.errors import DataError
from llmtrain.tokenizer.tokenizer import load as load_tokenizer

logger = logging.getLogger(__name__)

_BYTES_PER_LINE = 40
"""Lines are at least about this long; the estimate decides the number of buckets."""


class Pipeline:
    """Runs the stages of one configuration in one folder."""

    def __init__(self, config: PipelineConfig, context: Context) -> None:
        """Nothing is read or written before ``run``."""
        self.config = config
        self.context = context
        self.rows: list[FunnelRow] = []
        self._number = 0
        self._memory_bytes = int(config.memory_gib * 2**30)

    def run(self, files: Sequence[RawFile]) -> list[FunnelRow]:
        """Run every stage that is not finished; return the funnel."""
        shards = self._extract(files)
        self._check_left(shards)
        for name in self.config.stages:
            shards = _STAGES[name](self, name, shards)
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

    def _stage(
        self, name: str, settings: dict[str, Any], inputs: list[dict[str, Any]], target: str = ""
    ) -> Stage:
        numbered = f"{self._number:02d}-{name}"
        self._number += 1
        folder = self.context.out / target if target else None
        return Stage(self.context, numbered, settings, inputs, folder)

    def _note(self, stage: Stage, manifest: Manifest) -> None:
        row = make_row(stage.name, manifest.counts, stage.seconds())
        self.rows.append(row)
        logger.info("%s", summarise(row))

    def _extract(self, files: Sequence[RawFile]) -> list[Shard]:
        settings = {"extract": asdict(self.config.extract), "fields": asdict(self.config.fields)}
        stage = self._stage("extract", settings, file_inputs(files))
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

    def _steps(self, name: str, shards: Sequence[Shard]) -> list[Shard]:
        specs = step_specs(name, self.config)
        stage = self._stage(name, step_settings(name, self.config), _inputs(shards))

        def work() -> tuple[list[TaskResult], dict[str, Any]]:
            common = {"stage": stage.name, "out": str(self.context.out), "steps": specs}
            return stage.run("steps", apply_steps, _jobs(shards, common)), {}

        return self._finish(stage, work)

    def _keyed(self, name: str, shards: Sequence[Shard]) -> list[Shard]:
        settings = {"variant": self.config.c4.variant} if name == "line_dedup" else {}
        stage = self._stage(name, settings, _inputs(shards))
        buckets = num_buckets(self._record_bytes(name, shards), self._memory_bytes)

        def work() -> tuple[list[TaskResult], dict[str, Any]]:
            out = str(self.context.out)
            stage.run("keys", emit_keys, _jobs(shards, {"out": out, "kind": name}, index=True))
            self._reduce(stage, reduce_keys, len(shards), buckets)
            common = {"stage": stage.name, "out": out, "buckets": buckets}
            if name == "line_dedup":
                jobs = _jobs(shards, {**common, **settings}, index=True)
                return stage.run("apply", drop_lines, jobs), {"buckets": buckets}
            jobs = _jobs(shards, {**common, "kind": name}, index=True)
            return stage.run("apply", drop_documents, jobs), {"buckets": buckets}

        return self._finish(stage, work)

    def _record_bytes(self, name: str, shards: Sequence[Shard]) -> int:
        if name == "line_dedup":
            return RECORD.itemsize * sum(s.text_bytes // _BYTES_PER_LINE + s.rows for s in shards)
        return RECORD.itemsize * sum(shard.rows for shard in shards)

    def _reduce(
        self, stage: Stage, function: Callable[..., TaskResult], num_shards: int, buckets: int
    ) -> None:
        common = {"stage_folder": str(stage.folder), "buckets": buckets, "num_shards": num_shards}
        stage.run("reduce", function, [({**common, "bucket": b}, 1) for b in range(buckets)])

    def _minhash(self, name: str, shards: Sequence[Shard]) -> list[Shard]:
        preset = self.config.minhash.preset
        stage = self._stage(name, {"preset": preset}, _inputs(shards))
        firsts = [sum(s.rows for s in shards[:i]) for i in range(len(shards))]
        buckets = num_buckets(16 * 32 * sum(s.rows for s in shards), self._memory_bytes)

        def work() -> tuple[list[TaskResult], dict[str, Any]]:
            out, folder = str(self.context.out), str(stage.folder)
            jobs = _jobs(shards, {"out": out, "preset": preset}, index=True)
            jobs = [
                ({**job, "first": f}, cost) for (job, cost), f in zip(jobs, firsts, strict=True)
            ]
            stage.run("bands", emit_bands, jobs)
            self._reduce(stage, reduce_bands, len(shards), buckets)
            join = {
                "out": out, "stage_folder": folder, "shards": list(shards), "buckets": buckets,
                "memory_bytes": self._memory_bytes,
            }  # fmt: skip
            (joined,) = stage.run("join", find_clusters, [(join, 1)])
            common = {"stage": stage.name, "out": out}
            jobs = [
                ({**job, "first": f}, cost)
                for (job, cost), f in zip(_jobs(shards, common), firsts, strict=True)
            ]
            results = stage.run("apply", keep_longest, jobs)
            return results, {"buckets": buckets, **joined.details}

        return self._finish(stage, work)

    def _split(self, shards: Sequence[Shard]) -> list[Shard]:
        settings = asdict(self.config.split)
        stage = self._stage("split", settings, _inputs(shards))

        def work() -> tuple[list[TaskResult], dict[str, Any]]:
            common = {
                "stage": stage.name, "out": str(self.context.out), "key": self.config.split.key,
                "share": self.config.split.validation_share,
            }  # fmt: skip
            results = stage.run("route", route, _jobs(shards, common))
            routes = {
                split: sum(result.details[split] for result in results)
                for split in ("train", "validation")
            }
            return results, {"routes": routes}

        return self._finish(stage, work)

    def _tokenizer(self, shards: Sequence[Shard]) -> Path:
        """Return the folder of the tokenizer, trained if none is given."""
        settings = self.config.tokenizer
        if settings.path is not None:
            return Path(settings.path)
        train = [shard for shard in shards if split_of(shard) == "train"]
        stage = self._stage("tokenizer", asdict(settings), _inputs(train), target="tokenizer")
        if stage.finished() is None:
            job = {"out": str(self.context.out), "shards": train, "settings": settings}
            stage.finish(stage.run("train", train_tokenizer, [(job, 1)]))
        logger.info("%s: %.1f s", stage.name, stage.seconds())
        return self.context.out / "tokenizer"

    def _tokenize(self, shards: Sequence[Shard], folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        settings = {
            "tokenizer": tokenizer.hash, "eos_id": tokenizer.eos_id,
            "part_bytes": self.config.store.part_bytes,
        }  # fmt: skip
        stage = self._stage("tokenize", settings, _inputs(shards), target="stores")
        manifest = stage.finished()
        if manifest is None:
            jobs = self._parts(shards, folder)
            withdraw(stage.target, {arguments["store"] for arguments, _ in jobs})
            results = stage.run("parts", tokenize_shards, jobs)
            stores = publish(stage, results, tokenizer, config_hash(self.config))
            manifest = stage.finish([*results, stores])
        self._note(stage, manifest)

    def _parts(self, shards: Sequence[Shard], folder: Path) -> list[tuple[dict[str, Any], int]]:
        stores: dict[str, list[Shard]] = {}
        for shard in shards:
            stores.setdefault(f"{split_of(shard)}/{shard.source}", []).append(shard)
        common = {"out": str(self.context.out), "tokenizer": str(folder)}
        return [
            (
                {**common, "store": store, "index": i, "shards": group},
                sum(s.text_bytes for s in group),
            )
            for store, members in sorted(stores.items())
            for i, group in enumerate(group_shards(members, self.config.store.part_bytes))
        ]

    def _finish(
        self, stage: Stage, work: Callable[[], tuple[list[TaskResult], dict[str, Any]]]
    ) -> list[Shard]:
        """Run the stage unless it is finished; return its documents."""
        manifest = stage.finished()
        if manifest is None:
            results, details = work()
            manifest = stage.finish(results, details)
        self._note(stage, manifest)
        return manifest.shards


_STAGES: dict[str, Callable[[Pipeline, str, Sequence[Shard]], list[Shard]]] = {
    "url": Pipeline._keyed,
    "line_dedup": Pipeline._keyed,
    "exact": Pipeline._keyed,
    "c4": Pipeline._steps,
    "language": Pipeline._steps,
    "bad_words": Pipeline._steps,
    "minhash": Pipeline._minhash,
}
"""Stage name in ``pipeline.stages`` -> what runs it."""


def _inputs(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    return [{"name": Path(shard.path).name, "digest": shard.digest} for shard in shards]


def _jobs(
    shards: Sequence[Shard], common: dict[str, Any], *, index: bool = False
) -> list[tuple[dict[str, Any], int]]:
    """One job per shard: its arguments and its size."""
    return [
        ({**common, "shard": shard, **({"index": i} if index else {})}, shard.text_bytes)
        for i, shard in enumerate(shards)
    ]


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
    if "bad_words" in config.stages and config.bad_words.path is not None:
        read_bad_words(Path(config.bad_words.path))
    if "language" in config.stages:
        identifier_version(config.language.method)
