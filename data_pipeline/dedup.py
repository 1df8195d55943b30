"""Keyed deduplication: of all records with equal keys one stays, whoever runs the tasks.

A record is (key, order, place). Keys are 128-bit hashes; among equal keys the record with the
smallest order stays, and among equal orders the one that comes first in the corpus. Each shard's
task settles what it can see and passes on only its own winner per key, so that a key that stands
everywhere costs one record per shard; buckets are ranges of the key, cut by the size of the corpus
and never by the number of workers.

    winners, losers = settle(url_records(table, shard_index))
"""

import os
from collections.abc import Callable, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.document import Document, Run
from data_pipeline.filters.c4 import C4_VARIANTS, C4Options, enough_sentences, line_key
from data_pipeline.manifest import Counts, TaskResult
from data_pipeline.shards import Shard, from_table, read_table, to_table
from data_pipeline.step import Dropped, Kept, Verdict
from data_pipeline.transform import Sink, count_edit
from data_pipeline.url import normalize_c4, url_digest

Records = npt.NDArray[np.void]
RECORD = np.dtype([
    ("key_hi", "<u8"), ("key_lo", "<u8"), ("order_hi", "<u8"), ("order_lo", "<u8"),
    ("shard", "<u4"), ("row", "<u4"), ("line", "<u4"),
])  # fmt: skip
PLACE = ("shard", "row", "line")
_LAST = (1 << 64) - 1


def num_buckets(record_bytes: int, memory_bytes: int) -> int:
    """Return how many buckets keep each below a quarter of the memory, as a power of two."""
    needed = max(1, -(-4 * record_bytes // memory_bytes))
    return 1 << (needed - 1).bit_length()


def bucket_range(bucket: int, buckets: int) -> tuple[int, int]:
    """Return the first and the last ``key_hi`` of a bucket."""
    width = (1 << 64) // buckets
    return bucket * width, (bucket + 1) * width - 1


def settle(records: Records) -> tuple[Records, Records]:
    """Return (one winner per key, sorted by key; all others)."""
    names = ("line", "row", "shard", "order_lo", "order_hi", "key_lo", "key_hi")
    ordered = records[np.lexsort([records[name] for name in names])]
    first = np.ones(len(ordered), bool)
    same = ordered["key_hi"][1:] == ordered["key_hi"][:-1]
    first[1:] = ~(same & (ordered["key_lo"][1:] == ordered["key_lo"][:-1]))
    return ordered[first], ordered[~first]


def places(records: Records) -> Records:
    """Return where the records stand, in the order of the corpus."""
    found = records[list(PLACE)]
    order = np.lexsort([found[name] for name in reversed(PLACE)])
    return np.ascontiguousarray(found[order].astype([(name, "<u4") for name in PLACE]))


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def _hash(text: str) -> tuple[int, int]:
    return _halves(blake3.blake3(text.encode()).digest(length=16))


def _age(timestamp: str) -> int:
    """Return a number that is smaller for newer times; the largest for none.

    A time without a zone is UTC, not that of the machine.
    """
    if not timestamp:
        return _LAST
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        return _LAST
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return _LAST - 1 - max(0, round(moment.timestamp() * 1_000_000))


def page_order(url: str, document_id: str) -> tuple[int, int]:
    """Return the rank of a page among those that share a line: md5 of its normalised address."""
    name = normalize_c4(url) if url else document_id
    return _halves(bytes.fromhex(url_digest(name)))


def _records(rows: list[tuple[int, ...]]) -> Records:
    return np.array(rows, dtype=RECORD)


def url_records(table: pa.Table, shard: int) -> Records:
    """Key: the normalised address; the newest page stays. Pages without an address have no key."""
    columns = zip(*(table.column(n).to_pylist() for n in ("url", "timestamp")), strict=True)
    return _records([
        (*_hash(normalize_c4(url)), _age(timestamp), 0, shard, row, 0)
        for row, (url, timestamp) in enumerate(columns)
        if url
    ])  # fmt: skip


def text_records(table: pa.Table, shard: int) -> Records:
    """Key: the text; the document with the smallest id stays."""
    columns = zip(*(table.column(n).to_pylist() for n in ("text", "id")), strict=True)
    return _records([
        (*_hash(text), *_halves(bytes.fromhex(id_)), shard, row, 0)
        for row, (text, id_) in enumerate(columns)
    ])  # fmt: skip


def line_records(table: pa.Table, shard: int) -> Records:
    """Key: the line without case and margins; it stays in the page with the smallest md5(url)."""
    columns = zip(*(table.column(n).to_pylist() for n in ("text", "url", "id")), strict=True)
    rows: list[tuple[int, ...]] = []
    for row, (text, url, id_) in enumerate(columns):
        order = page_order(url, id_)
        rows += [
            (*_halves(line_key(line)), *order, shard, row, number)
            for number, line in enumerate(text.split("\n"))
            if line.strip()
        ]
    return _records(rows)


KEYS: dict[str, tuple[Callable[[pa.Table, int], Records], list[str]]] = {
    "url": (url_records, ["url", "timestamp"]),
    "exact": (text_records, ["text", "id"]),
    "line_dedup": (line_records, ["text", "url", "id"]),
}
"""Stage -> its records and the columns they are made from."""


def emit_keys(folder: Path, out: str, kind: str, shard: Shard, index: int) -> TaskResult:
    """Write a shard's winners, sorted by key, and the places that already lost inside it."""
    make, columns = KEYS[kind]
    winners, losers = settle(make(read_table(Path(out), shard, columns), index))
    return save_work(
        folder,
        {f"work/keys-{index:05d}.npy": winners, f"work/local-{index:05d}.npy": places(losers)},
    )


def save_work(folder: Path, arrays: dict[str, npt.NDArray[Any]]) -> TaskResult:
    """Write arrays that only the stage itself reads."""
    for name, array in arrays.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
    return TaskResult(work={name: (folder / name).stat().st_size for name in arrays})


def read_bucket(
    stage_folder: Path, field: str, bounds: tuple[int, int], num_shards: int
) -> Records:
    """Return the records of all shards whose key, sorted in each, lies within ``bounds``."""
    parts = []
    for index in range(num_shards):
        keys = np.load(stage_folder / f"work/keys-{index:05d}.npy", mmap_mode="r")
        start = np.searchsorted(keys[field], np.uint64(bounds[0]), side="left")
        end = np.searchsorted(keys[field], np.uint64(bounds[1]), side="right")
        parts.append(np.asarray(keys[start:end]))
    return np.concatenate(parts)


def reduce_keys(
    folder: Path, stage_folder: str, bucket: int, buckets: int, num_shards: int
) -> TaskResult:
    """Settle one bucket over all shards and write the places that lost."""
    records = read_bucket(Path(stage_folder), "key_hi", bucket_range(bucket, buckets), num_shards)
    _, losers = settle(records)
    return save_work(folder, {f"work/lost-{bucket:05d}.npy": places(losers)})


def losers_of(stage_folder: Path, index: int, buckets: int) -> dict[int, set[int]]:
    """Return row -> lines that lost, for one shard."""
    work = stage_folder / "work"
    found: dict[int, set[int]] = {}
    for path in (
        work / f"local-{index:05d}.npy",
        *(work / f"lost-{bucket:05d}.npy" for bucket in range(buckets)),
    ):
        lost = np.load(path, mmap_mode="r")
        start = np.searchsorted(lost["shard"], np.uint32(index), side="left")
        end = np.searchsorted(lost["shard"], np.uint32(index), side="right")
        for _, row, line in lost[start:end].tolist():
            found.setdefault(row, set()).add(line)
    return found


def drop_documents(
    folder: Path, stage: str, out: str, kind: str, shard: Shard, index: int, buckets: int
) -> TaskResult:
    """Write the documents of a shard that won, and those that lost to ``dropped/``."""
    table = read_table(Path(out), shard)
    lost = losers_of(Path(out) / "stages" / stage, index, buckets)
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    sink.count_in(shard.rows, shard.text_characters, shard.text_bytes)
    mask = np.ones(table.num_rows, bool)
    mask[sorted(lost)] = False
    sink.write_kept(table.filter(pa.array(mask)))
    sink.write_dropped(table.filter(pa.array(~mask)), [f"{kind}.duplicate"] * len(lost))
    return sink.result


def drop_lines(
    folder: Path, stage: str, out: str, shard: Shard, index: int, buckets: int, variant: str
) -> TaskResult:
    """Delete the lines of a shard that lost; pages left empty or too short are dropped."""
    documents = from_table(read_table(Path(out), shard))
    lost = losers_of(Path(out) / "stages" / stage, index, buckets)
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    sink.count_in(shard.rows, shard.text_characters, shard.text_bytes)
    options = C4_VARIANTS[variant]
    kept: list[Document] = []
    dropped: list[Document] = []
    reasons: list[str] = []
    for row, document in enumerate(documents):
        verdict = without_duplicates(document, lost.get(row, set()), options)
        if isinstance(verdict, Dropped):
            dropped.append(document)
            reasons.append(verdict.reason)
            continue
        kept.append(verdict.document)
        sink.result.counts.add(Counts(deleted=verdict.deleted))
    sink.write_kept(to_table(kept))
    sink.write_dropped(to_table(dropped), reasons)
    return sink.result


def without_duplicates(document: Document, lost: Set[int], options: C4Options) -> Verdict:
    """Return the document without the lines that lost; C4 counts the sentences of every page again.

    Reasons: ``line_dedup.empty``, ``line_dedup.few_sentences``.
    """
    text, runs = without_lines(document.text, lost) if lost else (document.text, [])
    if not text:
        return Dropped("line_dedup.empty")
    if not enough_sentences(text, options.sentences, options.min_sentences):
        return Dropped("line_dedup.few_sentences")
    if not lost:
        return Kept(document)
    counts = Counts()
    gone = {"line_dedup.duplicate": len(document.text) - len(text)}
    count_edit(counts, "line_dedup", document.text, text, runs, gone)
    return Kept(document.edited(text, runs), counts.deleted)


def without_lines(text: str, numbers: Set[int]) -> tuple[str, list[Run]]:
    """Return the text without some of its lines (and their newlines), and the runs that stayed."""
    runs: list[Run] = []
    origin = final = 0
    lines = text.split("\n")
    for number, line in enumerate(lines):
        length = len(line) + (number < len(lines) - 1)
        if number not in numbers and length:
            if runs and runs[-1].extracted_start + runs[-1].length == origin:
                runs[-1] = runs[-1]._replace(length=runs[-1].length + length)
            else:
                runs.append(Run(final, origin, length))
            final += length
        origin += length
    result = "".join(text[run.extracted_start : run.extracted_start + run.length] for run in runs)
    if len(lines) - 1 in numbers and result.endswith("\n"):
        result = result[:-1]
        last = runs.pop()
        if last.length > 1:
            runs.append(last._replace(length=last.length - 1))
    return result, runs
