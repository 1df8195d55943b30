"""Keyed deduplication: of all records with equal keys one stays, whoever runs the tasks.

Each shard's task settles what it can see and passes on only its own winner per key, so that a key
that stands everywhere costs one record per shard; buckets are ranges of the key, cut by the size of
the corpus and never by the number of workers, and a bucket above the memory is read in ranges of
further bits. What lost is written as places (shard, row, line), sorted.

    winners, losers = settle(url_records(table, shard_index, first_row))
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.dedup.keys import KEYS, RECORD
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
)
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import Shard, digest_of_file, read_batches

PLACE = np.dtype([("shard", "<u4"), ("row", "<u4"), ("line", "<u4")])
"""Where something stands in the corpus; the line is 0 for whole documents."""
KEY128 = np.dtype([("key_hi", "<u8"), ("key_lo", "<u8")])
"""A key without its place, as later runs read it."""
BATCH = 256
"""Documents whose records are made at once."""
_RECORD_ORDER = ("line", "row", "shard", "order_lo", "order_hi", "key_lo", "key_hi")


def settle(records: Records) -> tuple[Records, Records]:
    """Return (one winner per key, sorted by key; the places of all others, sorted)."""
    by_key = records[np.argsort(records["key_hi"], kind="stable")]
    shared = np.zeros(len(by_key), bool)
    same = by_key["key_hi"][1:] == by_key["key_hi"][:-1]
    shared[1:] |= same
    shared[:-1] |= same
    contested = by_key[shared]
    order = np.lexsort([contested[name] for name in _RECORD_ORDER])
    by_key[shared] = contested[order]
    first = np.ones(len(by_key), bool)
    first[1:] = ~(same & (by_key["key_lo"][1:] == by_key["key_lo"][:-1]))
    return by_key[first], places(by_key[~first])


def places(records: Records) -> Records:
    """Return where the records stand, in the order of the corpus."""
    found = np.empty(len(records), PLACE)
    for name in ("shard", "row", "line"):
        found[name] = records[name]
    return found[np.lexsort((found["line"], found["row"], found["shard"]))]


def tables_of(
    out: str, shard: Shard, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of the first row, some rows) of a shard, a few documents at a time."""
    first = 0
    for group in read_batches(Path(out), shard, columns):
        for start in range(0, group.num_rows, BATCH):
            yield first + start, group.slice(start, BATCH)
        first += group.num_rows


def emit_keys(
    folder: Path, out: str, kind: str, shard: Shard, index: int, memory_bytes: int,
    options: Mapping[str, Any],
) -> TaskResult:  # fmt: skip
    """Write a shard's winners, sorted by key, and the places that already lost inside it."""
    keys = KEYS[kind]
    names = (f"keys-{index:05d}", f"local-{index:05d}")
    writer = SortedWriter(folder, *names, "key_hi", limit_bytes(memory_bytes), settle)
    for first, table in tables_of(out, shard, keys.columns):
        writer.add(keys.make(table, index, first, **options))
    return TaskResult(work=writer.close())


def shard_files(stage_folder: str, num_shards: int, dtype: np.dtype[Any]) -> list[RecordFile]:
    """Return the files of keys that the shards of a stage have written."""
    work = Path(stage_folder) / "work"
    return [RecordFile(work / f"keys-{index:05d}.bin", dtype) for index in range(num_shards)]


def reduce_keys(
    folder: Path, stage_folder: str, bucket: int, buckets: int, num_shards: int,
    memory_bytes: int, known: Sequence[str], keep_keys: bool,
) -> TaskResult:  # fmt: skip
    """Settle one bucket over all shards and write the places that lost.

    ``known`` are files of keys of earlier corpora; a winner whose key is in one loses as well, to
    ``work/known-*``. ``keep_keys`` writes the keys of the bucket to ``keys/``.
    """
    files = shard_files(stage_folder, num_shards, RECORD)
    old = [RecordFile(Path(path), KEY128) for path in known]
    lost = PartWriter(folder, f"lost-{bucket:05d}")
    gone = PartWriter(folder, f"known-{bucket:05d}")
    kept = PartWriter(folder, f"keys-{bucket:05d}", "keys")
    limit = limit_bytes(memory_bytes)
    for bounds, slices in split_range(files, "key_hi", bucket_range(bucket, buckets), limit):
        winners: Records = np.empty(0, RECORD)
        for settled, losers in reduce_slices(slices, limit, settle):
            winners = settled
            lost.add(losers)
        gone.add(places(winners[_among(winners, old, bounds, limit)]))
        if keep_keys:
            kept.add(winners[["key_hi", "key_lo"]].astype(KEY128))
    return TaskResult(
        work={**lost.work, **gone.work},
        files={name: digest_of_file(folder / name) for name in kept.work},
    )


def _among(
    keys: Records, files: Sequence[RecordFile], bounds: tuple[int, int], limit: int
) -> npt.NDArray[np.bool_]:
    """Return which keys, sorted, stand in one of the files."""
    found = np.zeros(len(keys), bool)
    for file in files:
        (part,) = slices_of([file], "key_hi", bounds)
        step = max(1, limit // file.dtype.itemsize)
        for start in range(part.start, part.end, step):
            known = file.read(start, min(part.end, start + step))
            low = np.searchsorted(keys["key_hi"], known["key_hi"], "left")
            high = np.searchsorted(keys["key_hi"], known["key_hi"], "right")
            for offset in range(int((high - low).max(initial=0))):
                at = low + offset
                inside = at < high
                equal = keys["key_lo"][at[inside]] == known["key_lo"][inside]
                found[at[inside][equal]] = True
    return found
