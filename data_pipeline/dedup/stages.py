"""How stages that see many documents at once are put together from their tasks.

Each is a map over the shards, a reduction over buckets of keys, and a map that applies what was
found; the number of buckets comes from the size of the corpus and the memory of a worker, stands in
the manifest, and never depends on workers.

    shards = KEYED["exact"](pipeline, "exact", shards)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any, Protocol

from data_pipeline.config.dedup import Folders
from data_pipeline.config.run import PipelineConfig
from data_pipeline.dedup.cluster import BAND, emit_bands, reduce_bands
from data_pipeline.dedup.earlier import KeyFile, check_files, earlier_keys
from data_pipeline.dedup.jaccard import SET_BAND, check_pairs
from data_pipeline.dedup.keyed import emit_keys, reduce_keys
from data_pipeline.dedup.keys import KEYS, RECORD
from data_pipeline.dedup.losers import drop_documents, drop_parts
from data_pipeline.dedup.paragraphs import drop_paragraphs, emit_ngrams, find_seen, num_parts
from data_pipeline.dedup.sorted_runs import num_buckets
from data_pipeline.dedup.substring import (
    DEFAULT_LENGTH,
    blocks_of,
    default_block_bytes,
    drop_repeats,
    find_repeats,
)
from data_pipeline.dedup.survivors import find_clusters, keep_members
from data_pipeline.jobs import shard_inputs, shard_jobs
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard
from data_pipeline.stages import Context, Stage

Work = Callable[[], tuple[list[TaskResult], dict[str, Any]]]
"""Runs the tasks of a stage: (results with documents, details for the manifest)."""
_MAX_BANDS = 26


class Driver(Protocol):
    """What a stage needs of the pipeline."""

    config: PipelineConfig
    context: Context
    memory_bytes: int

    def stage(
        self, name: str, settings: dict[str, Any], inputs: list[dict[str, Any]], target: str = ""
    ) -> Stage:
        """Return the next stage of the pipeline."""
        ...

    def finish(self, stage: Stage, work: Work) -> list[Shard]:
        """Run the stage unless it is finished; return its documents."""
        ...


def _known_inputs(files: Sequence[KeyFile]) -> list[dict[str, Any]]:
    return [{"name": f"against-{i:05d}", "digest": file.digest} for i, file in enumerate(files)]


def _reduce(
    stage: Stage, function: Callable[..., TaskResult], buckets: int, common: Mapping[str, Any]
) -> list[TaskResult]:
    jobs = [
        ({**common, "stage_folder": str(stage.folder), "buckets": buckets, "bucket": bucket}, 1)
        for bucket in range(buckets)
    ]
    return stage.run("reduce", function, jobs)


def _keys_only(results: Sequence[TaskResult]) -> list[TaskResult]:
    """Return what the manifest has to name of a reduction: the keys kept for later runs."""
    return [TaskResult(files=result.files) for result in results]


def _keyed(
    pipeline: Driver, name: str, shards: Sequence[Shard], *, settings: dict[str, Any],
    emit: dict[str, Any], against: Folders = None, keep_keys: bool = False,
    apply: dict[str, Any] | None = None,
) -> list[Shard]:  # fmt: skip
    """Run a stage over keys; ``apply`` are the options of a stage that deletes parts."""
    known = earlier_keys(against, name, {})
    stage = pipeline.stage(name, settings, [*shard_inputs(shards), *_known_inputs(known)])
    size = KEYS[name].bytes_per_record
    records = sum(shard.rows + (shard.text_bytes // size if size else 0) for shard in shards)
    memory = {"memory_bytes": pipeline.memory_bytes}
    buckets = num_buckets(RECORD.itemsize * records, pipeline.memory_bytes)

    def work() -> tuple[list[TaskResult], dict[str, Any]]:
        check_files(known)
        out = {"out": str(pipeline.context.out), "kind": name}
        jobs = shard_jobs(shards, {**out, **memory, "options": emit}, index=True)
        stage.run("keys", emit_keys, jobs)
        common = {
            **memory, "num_shards": len(shards), "known": [file.path for file in known],
            "keep_keys": keep_keys,
        }  # fmt: skip
        reduced = _reduce(stage, reduce_keys, buckets, common)
        if apply is None:
            jobs = shard_jobs(shards, {**out, "stage": stage.name}, index=True)
            results = stage.run("apply", drop_documents, jobs)
        else:
            jobs = shard_jobs(shards, {**out, "stage": stage.name, "options": apply}, index=True)
            results = stage.run("apply", drop_parts, jobs)
        return [*results, *_keys_only(reduced)], {"buckets": buckets}

    return pipeline.finish(stage, work)


def url_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Of pages with the same address keep the newest."""
    config = pipeline.config.url
    return _keyed(
        pipeline, name, shards, settings={"keep_keys": config.keep_keys}, emit={},
        against=config.against, keep_keys=config.keep_keys,
    )  # fmt: skip


def exact_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Of documents with the same text keep one."""
    config = pipeline.config.exact
    return _keyed(
        pipeline, name, shards, settings={"keep_keys": config.keep_keys}, emit={},
        against=config.against, keep_keys=config.keep_keys,
    )  # fmt: skip


def line_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Of equal lines keep one, as C4's code does."""
    settings = {"variant": pipeline.config.c4.variant}
    return _keyed(pipeline, name, shards, settings=settings, emit={}, apply=settings)


def span_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Of equal spans of sentences keep one, as C4's paper says."""
    settings = asdict(pipeline.config.span_dedup)
    emit = {"sentences": pipeline.config.span_dedup.sentences}
    return _keyed(pipeline, name, shards, settings=settings, emit=emit, apply=settings)


def minhash_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Keep one document of every cluster of near-duplicates."""
    config = pipeline.config.minhash
    settings = {key: value for key, value in asdict(config).items() if key != "against"}
    known = earlier_keys(config.against, name, {"preset": config.preset})
    stage = pipeline.stage(name, settings, [*shard_inputs(shards), *_known_inputs(known)])
    checked = config.jaccard_threshold is not None
    width = (SET_BAND if checked else BAND).itemsize * _MAX_BANDS
    buckets = num_buckets(width * sum(shard.rows for shard in shards), pipeline.memory_bytes)
    folder, memory = str(stage.folder), {"memory_bytes": pipeline.memory_bytes}

    def work() -> tuple[list[TaskResult], dict[str, Any]]:
        check_files(known)
        out = {"out": str(pipeline.context.out)}
        options = {"preset": config.preset, "keep": config.keep, "checked": checked}
        jobs = shard_jobs(shards, {**out, **options, **memory}, index=True)
        firsts = accumulate((shard.rows for shard in shards), initial=0)
        for (job, _), first in zip(jobs, firsts, strict=False):
            job["first"] = first
        stage.run("bands", emit_bands, jobs)
        common = {
            **memory, "num_shards": len(shards), "checked": checked,
            "known": [file.path for file in known], "keep_keys": config.keep_keys,
        }  # fmt: skip
        reduced = _reduce(stage, reduce_bands, buckets, common)
        details = {"buckets": buckets}
        join = {**memory, "stage_folder": folder, "shards": list(shards)}
        if checked:
            job = {**join, "threshold": config.jaccard_threshold}
            checks = [({**job, "index": i}, shard.rows) for i, shard in enumerate(shards)]
            looked_at = stage.run("check", check_pairs, checks)
            details["pairs"] = sum(result.details["pairs"] for result in looked_at)
        (joined,) = stage.run("join", find_clusters, [(join, 1)])
        jobs = shard_jobs(shards, {**out, "stage": stage.name}, index=True)
        results = stage.run("apply", keep_members, jobs)
        return [*results, *_keys_only(reduced)], {**details, **joined.details}

    return pipeline.finish(stage, work)


def paragraph_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Delete paragraphs that mostly consist of n-grams seen before."""
    config = pipeline.config.paragraph_dedup
    stage = pipeline.stage(name, asdict(config), shard_inputs(shards))
    text_bytes = sum(shard.text_bytes for shard in shards)
    rate = config.false_positive_rate
    parts = num_parts(text_bytes, rate, pipeline.memory_bytes)

    def work() -> tuple[list[TaskResult], dict[str, Any]]:
        common = {
            "out": str(pipeline.context.out), "ngram": config.ngram, "parts": parts,
        }  # fmt: skip
        emitted = stage.run("ngrams", emit_ngrams, shard_jobs(shards, common, index=True))
        counts = [result.details["counts"] for result in emitted]
        jobs = [
            ({
                "stage_folder": str(stage.folder), "part": part, "rate": rate,
                "counts": [count[part] for count in counts], "memory_bytes": pipeline.memory_bytes,
            }, 1)
            for part in range(parts)
        ]  # fmt: skip
        passes = [result.details["passes"] for result in stage.run("seen", find_seen, jobs)]
        apply = {**common, "stage": stage.name, "share": config.share}
        results = stage.run("apply", drop_paragraphs, shard_jobs(shards, apply, index=True))
        details = {"parts": parts, "passes": max(passes), "ngrams": sum(map(sum, counts))}
        return results, details

    return pipeline.finish(stage, work)


def substring_stage(pipeline: Driver, name: str, shards: Sequence[Shard]) -> list[Shard]:
    """Delete stretches of text that stand earlier in the same block."""
    config = pipeline.config.substring
    length = config.min_length or DEFAULT_LENGTH[config.unit]
    block_bytes = config.block_bytes or default_block_bytes(pipeline.memory_bytes)
    settings = {"unit": config.unit, "min_length": length, "block_bytes": block_bytes}
    stage = pipeline.stage(name, settings, shard_inputs(shards))

    def work() -> tuple[list[TaskResult], dict[str, Any]]:
        out = {"out": str(pipeline.context.out)}
        common = {**out, "block_bytes": block_bytes, "unit": config.unit, "length": length}
        blocks = blocks_of(shards, block_bytes)
        jobs = [
            ({**common, "shards": reached, "block": block}, 1)
            for block, reached in enumerate(blocks)
        ]
        stage.run("repeats", find_repeats, jobs)
        apply = {**out, "stage": stage.name}
        results = stage.run("apply", drop_repeats, shard_jobs(shards, apply, index=True))
        return results, {"blocks": len(blocks)}

    return pipeline.finish(stage, work)


KEYED: Mapping[str, Callable[[Driver, str, Sequence[Shard]], list[Shard]]] = {
    "url": url_stage,
    "line_dedup": line_stage,
    "span_dedup": span_stage,
    "paragraph_dedup": paragraph_stage,
    "exact": exact_stage,
    "substring": substring_stage,
    "minhash": minhash_stage,
}
"""Stage -> what runs it."""
