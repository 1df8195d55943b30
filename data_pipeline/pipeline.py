"""The whole pipeline: raw files to token stores, stage after stage, each one finished or repeated.

``OUT/pipeline.json`` holds the settings the folder was begun with; another setting is refused, and
a finished stage is never made twice. The same command after any kind of death goes on.

    run_pipeline(config, executor)   # or: llmtrain-data run pipeline=demo input.web=crawl out=OUT
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
from data_pipeline.io import RawFile, TextFields, find_raw_files, fingerprint
from data_pipeline.manifest import Manifest, TaskResult
from data_pipeline.report import FunnelRow, make_row, render, summarise, write_funnel
from data_pipeline.shards import Shard, read_table
from data_pipeline.split import route, split_of
from data_pipeline.stages import Context, Stage, replace_file
from data_pipeline.steps import step_settings, step_specs
from data_pipeline.tokenize import group_shards, part_infos, tokenize_shards, train_tokenizer
from data_pipeline.transform import apply_steps, check_unique, extract_file
from llmtrain.config.load import config_hash, to_plain
from llmtrain.data.store import write_manifest
from llmtrain.errors import ConfigError, DataError
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
        for name in self.config.stages:
            shards = _STAGES[name](self, name, shards)
            if not shards:
                raise DataError(
                    f"no document is left after {self.rows[-1].stage}; its reasons: "
                    f"{self.rows[-1].dropped}; loosen the rules or give other input"
                )
        shards = self._split(shards)
        tokenizer = self._tokenizer(shards)
        self._tokenize(shards, tokenizer)
        return self.rows

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
        inputs = [{"source": f.source, "name": f.name, "digest": f.sha256} for f in files]
        stage = self._stage("extract", settings, inputs)
        manifest = stage.finished()
        if manifest is None:
            fields = TextFields(**asdict(self.config.fields))
            common = {"stage": stage.name, "settings": self.config.extract, "fields": fields}
            jobs = [({**common, "number": i, "file": f}, f.size) for i, f in enumerate(files)]
            results = stage.run("extract", extract_file, jobs)
            shards = [shard for result in results for shard in result.shards]
            check_unique(
                shards,
                (read_table(self.context.out, s, ["id"]).column("id").to_pylist() for s in shards),
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
        settings = {"tokenizer": tokenizer.hash, "part_bytes": self.config.store.part_bytes}
        stage = self._stage("tokenize", settings, _inputs(shards), target="stores")
        manifest = stage.finished()
        if manifest is None:
            results = stage.run("parts", tokenize_shards, self._parts(shards, folder))
            for store, parts in part_infos(results).items():
                write_manifest(
                    self.context.out / "stores" / store, parts, tokenizer_hash=tokenizer.hash,
                    vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id,
                    pipeline_hash=config_hash(self.config),
                )  # fmt: skip
            manifest = stage.finish(results)
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


def fingerprint_file(folder: Path, file: RawFile) -> TaskResult:
    """Task: the digest of one raw file."""
    done = fingerprint(file)
    return TaskResult(details={"size": done.size, "sha256": done.sha256})


def run_pipeline(config: RunConfig, context: Context) -> list[FunnelRow]:
    """Run the pipeline of ``config`` in ``context.out``; write and return the funnel.

    Raises:
        ConfigError: the folder was begun with other settings.
        DataError: an input is missing, unreadable or has changed.
    """
    files = find_raw_files(config.input)
    out = context.out
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, config)
    files = _fingerprints(out, files, context)
    pipeline = Pipeline(config.pipeline, context)
    rows = pipeline.run(files)
    write_funnel(out, rows)
    logger.info("%s", render(rows))
    return rows


def _claim(out: Path, config: RunConfig) -> None:
    """Note the settings of a new folder; refuse others for one that was begun before."""
    path = out / "pipeline.json"
    plain = {"pipeline": to_plain(config.pipeline), "sources": sorted(config.input)}
    if not path.is_file():
        replace_file(path, json.dumps(plain, indent=1, sort_keys=True) + "\n")
        return
    before = _flat(json.loads(path.read_text()))
    now = _flat(plain)
    changes = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changes:
        raise ConfigError(
            f"{out} was begun with other settings: {'; '.join(changes)}; use another out=, or "
            "remove the folder"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, entry in tree.items()
        for key, value in _flat(entry, f"{prefix}.{name}" if prefix else name).items()
    }


def _fingerprints(out: Path, files: Sequence[RawFile], context: Context) -> list[RawFile]:
    """Return the files with their digests, read again only where size or time changed."""
    path = out / "inputs.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    result: list[RawFile] = []
    for file in files:
        if file.format == "hf":
            result.append(fingerprint(file))
            continue
        status = Path(file.path).stat()
        stamp = [status.st_size, status.st_mtime_ns]
        entry = known.get(file.path)
        if entry is None or entry["stamp"] != stamp:
            entry = {"stamp": stamp, "sha256": fingerprint(file).sha256}
            known[file.path] = entry
        result.append(replace(file, size=status.st_size, sha256=entry["sha256"]))
    replace_file(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    return result
