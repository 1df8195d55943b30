"""The global shuffle of a store: its documents in the order of a keyed hash of their ids.

Two passes, each within the memory budget. The first encodes the documents and writes, per task,
Arrow files whose batches are sorted by key (``ScatterFiles``); the second takes one range of keys
after another out of all of them (``read_range``). A part is a range of keys, so the order of a
store depends on the ids and the seed alone: not on files, shards, workers, batches or the budget.

    scatter = Scatter(seed=0, chunk_bytes=64_000_000)
    tokens, offsets, records = read_range(files, number=3, of=16, vocab_size=32_000)
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.manifest import TaskResult
from llmtrain.data.indexed import token_dtype

if TYPE_CHECKING:
    from data_pipeline.tokens.tokenize import EncodedBatch

FOLDER = ".scatter"
"""Where the first pass writes, below the folder of the stores; gone when they are finished."""

UInt64Array = npt.NDArray[np.uint64]


class Scatter(NamedTuple):
    """How the first pass writes."""

    seed: int
    """Another seed is another order."""
    chunk_bytes: int
    """Documents are sorted in memory in chunks of about this size."""


def shuffle_keys(ids: Sequence[str], seed: int) -> UInt64Array:
    """Return a 64-bit key for each id (32 hex digits); the documents stand in their order."""
    halves = np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8").astype(np.uint64)
    high, low = halves.reshape(-1, 2).T
    return _mix(high ^ _mix(low ^ _mix(np.array([seed], np.uint64))))


def _mix(values: UInt64Array) -> UInt64Array:
    """The finalizer of SplitMix64 (Steele et al. 2014), a bijection of 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class ScatterFiles:
    """The scatter files of one task: ``FOLDER/STORE/00000.arrow`` for every store."""

    def __init__(self, folder: Path, index: int, scatter: Scatter, *, vocab_size: int) -> None:
        """File ``index`` of every store that documents come for, below ``folder``."""
        self._folder, self._index, self._scatter = folder, index, scatter
        self._dtype = token_dtype(vocab_size)
        self._pending: dict[str, list[pa.Table]] = {}
        self._pending_bytes = 0
        self._writers: dict[str, Any] = {}
        self._totals: dict[str, Counter[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            writer.close()

    def add(self, store: str, batch: "EncodedBatch") -> None:
        """Append documents of one store."""
        keys = shuffle_keys(batch.records.column("id").to_pylist(), self._scatter.seed)
        tokens = _to_binary(batch.tokens.astype(self._dtype), batch.offsets)
        table = batch.records.append_column("key", pa.array(keys)).append_column("tokens", tokens)
        totals = self._totals.setdefault(store, Counter())
        totals["documents"] += table.num_rows
        totals["tokens"] += len(batch.tokens) + table.num_rows
        totals["text_bytes"] += int(np.sum(batch.records.column("text_bytes").to_numpy()))
        self._pending.setdefault(store, []).append(table)
        self._pending_bytes += table.nbytes
        if self._pending_bytes >= self._scatter.chunk_bytes:
            self._flush()

    def close(self) -> TaskResult:
        """Write what is left; ``details`` says what every store got."""
        self._flush()
        result = TaskResult()
        for store, writer in sorted(self._writers.items()):
            writer.close()
            name = self._name(store)
            with (self._folder / name).open("rb+") as file:
                os.fsync(file.fileno())
                result.work[name] = file.seek(0, os.SEEK_END)
            self._totals[store]["bytes"] = result.work[name]
        result.details = {"scattered": {s: dict(totals) for s, totals in self._totals.items()}}
        return result

    def _name(self, store: str) -> str:
        return str(Path(FOLDER) / store / f"{self._index:05d}.arrow")

    def _flush(self) -> None:
        """Write what is pending, sorted by key, as one batch per store."""
        for store, tables in sorted(self._pending.items()):
            table = pa.concat_tables(tables)
            tables.clear()
            table = table.take(_order(table)).combine_chunks()
            if store not in self._writers:
                path = self._folder / self._name(store)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._writers[store] = pa.ipc.new_file(str(path), table.schema)
            self._writers[store].write_table(table)
        self._pending, self._pending_bytes = {}, 0


def _to_binary(tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64]) -> pa.Array:
    """Return the tokens of every document as bytes, which Arrow reorders faster than lists."""
    buffers = [None, pa.py_buffer(offsets * tokens.itemsize), pa.py_buffer(tokens)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def _from_binary(
    documents: pa.Array, dtype: np.dtype[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return (tokens, offsets) of documents; the inverse of ``_to_binary``."""
    _, offsets, data = documents.buffers()
    ends = np.frombuffer(offsets, np.int64, len(documents) + 1, documents.offset * 8)
    return np.frombuffer(data, dtype), ends // dtype.itemsize


def _order(table: pa.Table) -> pa.Array:
    """Return the rows of a table in the order of the shuffle; equal keys in the order of ids."""
    ids = np.array(table.column("id").to_pylist(), dtype="S32")
    return pa.array(np.lexsort((ids, table.column("key").to_numpy())))


def read_range(
    files: Sequence[str], number: int, of: int, vocab_size: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], pa.Table] | None:
    """Return the documents of range ``number`` of ``of`` equal ranges of keys, in order.

    As (tokens, offsets, records), or None if there are none. Reads only their pages of the files.
    """
    low, high = (bound * 2**64 // of for bound in (number, number + 1))
    found = [rows for file in files for rows in _rows_between(file, low, high)]
    if not found:
        return None
    table = pa.concat_tables(found)
    del found
    table = table.take(_order(table)).combine_chunks()
    tokens, offsets = _from_binary(table.column("tokens").chunk(0), token_dtype(vocab_size))
    return tokens, offsets, table.drop_columns(["key", "tokens"])


def _rows_between(file: str, low: int, high: int) -> Iterator[pa.Table]:
    """Yield copies of the rows whose keys lie in [low, high), a table per batch of the file.

    The file is mapped anew for every batch: the kernel maps what lies around whatever is read, and
    over all batches that is many times the rows themselves.
    """
    number, num_batches = 0, 1
    while number < num_batches:
        with pa.memory_map(file) as source, pa.ipc.open_file(source) as reader:
            num_batches = reader.num_record_batches
            batch = reader.get_batch(number)
            start, end = _between(batch.column("key").to_numpy(), low, high)
            rows = pa.Table.from_batches([batch.slice(start, end - start)])
            if start < end:
                yield rows.take(pa.array(np.arange(end - start))).combine_chunks()
            del batch, rows
        number += 1


def _between(keys: UInt64Array, low: int, high: int) -> tuple[int, int]:
    """Return where keys of [low, high) begin and end in sorted ``keys``."""
    end = len(keys) if high == 2**64 else int(np.searchsorted(keys, np.uint64(high)))
    return int(np.searchsorted(keys, np.uint64(low))), end
