"""Near-duplicate clusters: MinHash band keys become edges, edges become clusters, one page stays.

Documents that share a band key are joined to the first of them (k - 1 edges, never k squared), or,
with a threshold, to those whose shingles are similar enough (``jaccard.py``). Components do not
depend on the order of edges; a cluster's id is the smallest id of its members. Which member stays
is the order of the ``keep`` policy, then the length, then the smallest id. A cluster with a member
that shares a band with an earlier corpus goes as a whole.

    kept, edges = star_edges(records)
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.dedup.jaccard import (
    SET_BAND,
    SetWriter,
    candidates,
    edges_to_first,
    settle_sets,
)
from data_pipeline.dedup.keyed import shard_files, tables_of
from data_pipeline.dedup.keys import LAST_ORDER, age, halves
from data_pipeline.dedup.minhash import MinHasher
from data_pipeline.dedup.sorted_runs import (
    PartWriter,
    RecordFile,
    Records,
    SortedWriter,
    bucket_range,
    limit_bytes,
    reduce_slices,
    slices_of,
    split_range,
    write_array,
)
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard, digest_of_file
from llmtrain.errors import DataError

Keep = Literal["longest", "newest", "quality"]
BAND = np.dtype([("key", "<u8"), ("document", "<u4")])
"""A band key and the ordinal of the document in the corpus."""
BAND_KEY = np.dtype([("key", "<u8")])
"""A band key without its document, as later runs read it."""
RANK = np.dtype([
    ("order_hi", "<u8"), ("order_lo", "<u8"), ("id_hi", "<u8"), ("id_lo", "<u8"),
])  # fmt: skip
"""What decides which member of a cluster stays: the smallest."""
_RANKED_BY: dict[Keep, tuple[str, ...]] = {"newest": ("timestamp",), "quality": ("metadata",)}
"""Columns that a policy looks at, besides the text."""
_HIGHEST_SCORE = 1e12
KNOWN = np.dtype([("document", "<u4")])
"""A document that shares a band with an earlier corpus."""


def star_edges(records: Records) -> tuple[Records, Records]:
    """Return (the first record of every key, sorted by key; edges from the others to it)."""
    ordered = records[np.argsort(records["key"])]
    same = ordered["key"][1:] == ordered["key"][:-1]
    shared = np.zeros(len(ordered), bool)
    shared[1:] |= same
    shared[:-1] |= same
    contested = ordered[shared]
    ordered[shared] = contested[np.lexsort((contested["document"], contested["key"]))]
    first = np.ones(len(ordered), bool)
    first[1:] = ~same
    return ordered[first], edges_to_first(ordered["document"], first)


@lru_cache(maxsize=2)
def _hasher(preset: str) -> MinHasher:
    """Return a hasher; a worker keeps what it has learnt of characters."""
    return MinHasher(preset)


def emit_bands(
    folder: Path, out: str, shard: Shard, index: int, first: int, preset: str, keep: Keep,
    checked: bool, memory_bytes: int,
) -> TaskResult:  # fmt: skip
    """Write a shard's band keys, one record per key, the edges inside the shard, and the ranks.

    ``checked`` keeps one record per key and set of shingles, and writes the sets.
    """
    hasher = _hasher(preset)
    writer = SortedWriter(
        folder, f"keys-{index:05d}", f"edges-local-{index:05d}", "key", limit_bytes(memory_bytes),
        settle_sets if checked else star_edges,
    )  # fmt: skip
    sets = SetWriter(folder, index) if checked else None
    ranks = []
    for row, table in tables_of(out, shard, ("id", "text", *_RANKED_BY.get(keep, ()))):
        texts = table.column("text").combine_chunks()
        keys = hasher.band_keys(texts)
        records = np.empty(keys.shape, SET_BAND if checked else BAND)
        records["key"] = keys
        records["document"] = np.arange(first + row, first + row + len(texts))[:, None]
        if sets is not None:
            hashes = [sets.add(np.unique(hasher.shingles(text))) for text in texts.to_pylist()]
            records["set"] = np.array(hashes, np.uint64)[:, None]
        writer.add(records.ravel())
        ranks.append(_ranks(table, keep))
    name = f"work/ranks-{index:05d}.bin"
    work = {name: write_array(folder / name, ranks), **writer.close()}
    return TaskResult(work=work | (sets.close() if sets else {}))


def _ranks(table: pa.Table, keep: Keep) -> Records:
    """Return the rank of every document; smaller ones stay."""
    ranks = np.empty(table.num_rows, RANK)
    ids = halves([bytes.fromhex(id_) for id_ in table.column("id").to_pylist()])
    ranks["id_hi"], ranks["id_lo"] = ids[:, 0], ids[:, 1]
    characters = pc.utf8_length(table.column("text")).to_numpy().astype(np.uint64)
    ranks["order_hi"] = ranks["order_lo"] = np.uint64(LAST_ORDER) - characters
    if keep == "newest":
        ranks["order_hi"] = [age(moment) for moment in table.column("timestamp").to_pylist()]
    elif keep == "quality":
        entries = table.column("metadata").to_pylist()
        ranks["order_hi"] = [_badness(dict(entry).get("quality")) for entry in entries]
    return ranks


def _badness(score: str | None) -> int:
    """Return a number that is smaller for better scores; the largest for none.

    Raises:
        DataError: the score is no number, as a field ``quality`` of a source may be.
    """
    if score is None:
        return LAST_ORDER
    try:
        number = float(score)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            "pipeline.minhash.keep=quality needs numbers, but metadata['quality'] of a document "
            f"is {score[:60]!r}; leave that field out of pipeline.fields.metadata, or use "
            "keep=longest"
        )
    return (1 << 62) - round(max(-_HIGHEST_SCORE, min(_HIGHEST_SCORE, number)) * 1_000_000)


def reduce_bands(
    folder: Path, stage_folder: str, bucket: int, buckets: int, num_shards: int,
    memory_bytes: int, checked: bool, known: Sequence[str], keep_keys: bool,
) -> TaskResult:  # fmt: skip
    """Write the edges (or candidate pairs) that one range of keys gives over all shards.

    ``known`` are files of band keys of earlier corpora; who has one is written to
    ``work/known-*``. ``keep_keys`` writes the keys of the bucket to ``keys/``.
    """
    files = shard_files(stage_folder, num_shards, SET_BAND if checked else BAND)
    old = [RecordFile(Path(path), BAND_KEY) for path in known]
    edges = PartWriter(folder, f"edges-{bucket:05d}")
    pairs = PartWriter(folder, f"pairs-{bucket:05d}")
    gone = PartWriter(folder, f"known-{bucket:05d}")
    kept = PartWriter(folder, f"keys-{bucket:05d}", "keys")
    limit = limit_bytes(memory_bytes)
    reduction = settle_sets if checked else star_edges
    for bounds, slices in split_range(files, "key", bucket_range(bucket, buckets), limit):
        left: Records = np.empty(0, files[0].dtype)
        for reduced, given in reduce_slices(slices, limit, reduction):
            left = reduced
            edges.add(given)
        if checked:
            for some in candidates(left, limit):
                pairs.add(some)
        gone.add(_known_documents(left, old, bounds, limit))
        if keep_keys:
            kept.add(np.unique(left["key"]).astype("<u8"))
    return TaskResult(
        work={**edges.work, **pairs.work, **gone.work},
        files={name: digest_of_file(folder / name) for name in kept.work},
    )


def _known_documents(
    records: Records, files: Sequence[RecordFile], bounds: tuple[int, int], limit: int
) -> Records:
    """Return the documents of records, sorted by key, whose key stands in one of the files."""
    found = np.zeros(len(records), bool)
    step = max(1, limit // BAND_KEY.itemsize)
    for file in files:
        (part,) = slices_of([file], "key", bounds)
        for start in range(part.start, part.end, step):
            keys = file.read(start, min(part.end, start + step))["key"]
            at = np.minimum(np.searchsorted(keys, records["key"]), len(keys) - 1)
            found |= keys[at] == records["key"]
    return np.unique(records["document"][found]).astype(KNOWN)
