"""Cuts a token store into stores by a score of its documents, for a curriculum.

Every document goes to exactly one bucket, with its tokens and its row of ``docs.parquet`` as they
are, in the order it had. Buckets hold about equal tokens, the lowest scores first; among documents
of one score at an edge the ids decide. So which bucket a document is in depends on scores, lengths
and ids alone: not on the order of the documents, the parts of the store or the workers.

    cut(BucketsConfig(store="stores/web", out="stores/web-by-length", by="length"), executor)
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config.commands import BucketsConfig
from data_pipeline.execute.local import Executor, Task
from data_pipeline.tokens.scores import scores_of, source_of
from llmtrain.data.indexed import Int64Array
from llmtrain.data.manifest import MANIFEST, Manifest, ShardInfo, write_manifest
from llmtrain.data.store import TokenStore
from llmtrain.data.writer import ShardWriter
from llmtrain.errors import DataError

Float64Array = npt.NDArray[np.float64]
Names = Callable[[Int64Array], Sequence[str]]
"""Ids of some documents."""


def cut(config: BucketsConfig, executor: Executor) -> list[dict[str, Any]]:
    """Write the buckets of a store and return what is told of each, the lowest scores first.

    Holds about 50 bytes for every document of the store, twice that where scores have ids.

    Raises:
        DataError: the store has no records or no such score, a document has none, or the buckets
            are there already.
    """
    store, out = TokenStore.open(config.store), Path(config.out)
    manifest = store.manifest
    if manifest is None:
        raise DataError(
            f"{config.store} was written by another program: it names no tokenizer and keeps no "
            "records to copy; tokenize the text with `llmtrain-data tokenize`"
        )
    folders = [out / f"bucket-{number}" for number in range(1, config.buckets + 1)]
    if there := [folder for folder in folders if (folder / MANIFEST).exists()]:
        raise DataError(f"{there[0]} is a finished store; use another out= or remove it")
    lengths = np.concatenate([_lengths(store, shard) for shard in range(len(store.shards))])
    scores = scores_of(store, config.by, config.data, lengths)
    buckets = assign(scores, lengths, config.buckets, lambda chosen: _ids(store, chosen))
    infos = _write(config, store, buckets, executor)
    made = []
    for number, folder in enumerate(folders):
        inside = scores[buckets == number]
        facts = {
            "bucket": f"{number + 1} of {config.buckets}", "by": config.by,
            "scores": [float(inside.min()), float(inside.max())], "cut_from": manifest.hash,
        }  # fmt: skip
        notes = {"source": source_of(store), **manifest.notes, **facts}
        notes.pop("text_bytes", None)  # of parts that are others here
        written = _publish(folder, infos[number], manifest, notes)
        made.append({
            "store": str(folder), "documents": written.num_documents, "tokens": written.num_tokens,
            "lowest": facts["scores"][0], "highest": facts["scores"][1],
        })  # fmt: skip
    return made


def assign(
    scores: Float64Array, lengths: Int64Array, num_buckets: int, names: Names
) -> npt.NDArray[np.uint8]:
    """Return the bucket of each document, from 0.

    A document is in the bucket in which its middle token falls when all stand in the order of their
    scores, those of one score in the order of their ids.

    Args:
        scores: of each document, finite.
        lengths: tokens of each document.
        num_buckets: at most 256.
        names: ids of documents by their numbers; asked of those alone that stand at an edge.

    Raises:
        DataError: a bucket would be empty.
    """
    order = np.argsort(scores, kind="stable")
    total = int(lengths.sum())
    ends = np.cumsum(lengths[order])
    firsts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    lasts = np.append(firsts[1:], len(order)) - 1
    before, after = ends[firsts] - lengths[order[firsts]], ends[lasts]
    for number in range(1, num_buckets):  # equal scores around an edge: by their ids
        edge = total * number / num_buckets
        run = int(np.searchsorted(after, edge))
        if before[run] < edge and firsts[run] < lasts[run]:
            rows = np.sort(order[firsts[run] : lasts[run] + 1])
            by_name = np.argsort(np.array(names(rows), dtype="S"), kind="stable")
            order[firsts[run] : lasts[run] + 1] = rows[by_name]
    ends = np.cumsum(lengths[order])
    places = (2 * ends - lengths[order]) * num_buckets // (2 * total)
    buckets = np.empty(len(order), dtype=np.uint8)
    buckets[order] = places
    empty = np.flatnonzero(np.bincount(buckets, minlength=num_buckets) == 0)
    if len(empty):
        raise DataError(
            f"bucket {empty[0] + 1} of {num_buckets} would be empty: the store holds "
            f"{len(order):,} documents of up to {int(lengths.max()):,} tokens; use fewer buckets"
        )
    return buckets


def _lengths(store: TokenStore, shard: int) -> Int64Array:
    """Tokens of each document of a shard, EOS included."""
    numbers = np.arange(store.shards[shard].num_documents + 1)
    return np.diff(store.shards[shard].document_starts(numbers))


def _ids(store: TokenStore, documents: Int64Array) -> list[str]:
    """Ids of some documents, in rising order; one shard's column in memory at a time."""
    found, first = list[str](), 0
    for number in range(len(store.shards)):
        end = first + store.shards[number].num_documents
        inside = documents[(documents >= first) & (documents < end)]
        if len(inside):
            ids = pq.read_table(store.records_path(number), columns=["id"]).column("id")
            found += ids.take(inside - first).to_pylist()
        first = end
    return found


def _write(
    config: BucketsConfig, store: TokenStore, buckets: npt.NDArray[np.uint8], executor: Executor
) -> list[list[ShardInfo]]:
    """Write every shard of the store to its parts of the buckets; return these by bucket."""
    tasks, first = [], 0
    for number in range(len(store.shards)):
        shard = store.shards[number]
        part = buckets[first : first + shard.num_documents]
        given = {"store": config.store, "out": config.out, "num_buckets": config.buckets}
        arguments = {**given, "number": number, "buckets": part.tobytes()}
        tasks.append(Task(f"{number:08d}", write_task, arguments, cost=shard.num_tokens))
        first += shard.num_documents
    found: dict[str, list[ShardInfo]] = {}
    executor.run(tasks, lambda task, infos: found.update({task.key: infos}))
    return [[found[key][bucket] for key in sorted(found)] for bucket in range(config.buckets)]


def write_task(
    store: str, out: str, num_buckets: int, number: int, buckets: bytes
) -> list[ShardInfo]:
    """Write shard ``number`` of a store to part ``number`` of every bucket."""
    opened = TokenStore.open(store, check=False)
    manifest, shard = opened.manifest, opened.shards[number]
    if manifest is None:
        raise DataError(f"{store} lost its {MANIFEST} while it was cut; give the command again")
    chosen, first = np.frombuffer(buckets, dtype=np.uint8), 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(
                Path(out) / f"bucket-{bucket + 1}", number, vocab_size=manifest.vocab_size,
                eos_id=manifest.eos_id,
            ))
            for bucket in range(num_buckets)
        ]  # fmt: skip
        with pq.ParquetFile(opened.records_path(number)) as records:
            for group in range(records.num_row_groups):
                table = records.read_row_group(group)
                starts = shard.document_starts(np.arange(first, first + table.num_rows + 1))
                tokens = shard.tokens(int(starts[0]), int(starts[-1]))
                _check_ends(tokens[starts[1:] - starts[0] - 1], manifest.eos_id, shard.name)
                own = chosen[first : first + table.num_rows]
                for bucket in np.unique(own).tolist():
                    kept = own == bucket
                    mask = np.repeat(kept, np.diff(starts))
                    mask[starts[1:] - starts[0] - 1] = False  # the writer ends documents itself
                    lengths = np.diff(starts)[kept] - 1
                    offsets = np.concatenate([[0], np.cumsum(lengths)])
                    rows = table.filter(pc.equal(own, bucket)).drop_columns(["num_tokens"])
                    roles = None
                    if manifest.has_roles:
                        given = shard.roles(int(starts[0]), int(starts[-1]))
                        roles = given[np.repeat(kept, np.diff(starts))]
                    writers[bucket].add_batch(tokens[mask], offsets, rows, roles)
                first += table.num_rows
    return [writer.info for writer in writers]


def _check_ends(ends: npt.NDArray[Any], eos_id: int, name: str) -> None:
    if (ends != eos_id).any():
        raise DataError(
            f"{name} has documents that do not end with token {eos_id}, which its manifest says "
            "they do; it is damaged: run `llmtrain-data verify` and write the store again"
        )


def _publish(
    folder: Path, infos: Sequence[ShardInfo], manifest: Manifest, notes: dict[str, Any]
) -> Manifest:
    for left in folder.glob("*.tmp"):
        left.unlink()  # of a worker that was killed
    return write_manifest(
        folder, infos, tokenizer_hash=manifest.tokenizer_hash, vocab_size=manifest.vocab_size,
        eos_id=manifest.eos_id, pipeline_hash=manifest.pipeline_hash, notes=notes,
    )  # fmt: skip
