"""A score of every document of a token store: its length, a file's, or one the pipeline noted.

Scores of a file or of the pipeline are found by the documents' ids; a document without one, or with
one that is no finite number, is refused.

    scores_of(store, "quality", data=None, lengths=lengths)     # float64 [documents]
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.report.record import read_folder
from data_pipeline.shards import read_batches
from llmtrain.data.indexed import Int64Array
from llmtrain.data.store import TokenStore
from llmtrain.errors import ConfigError, DataError

LENGTH = "length"
"""The score that is the number of tokens."""
_BATCH_ROWS = 1 << 16

Float64Array = npt.NDArray[np.float64]
Ids = npt.NDArray[np.bytes_]


def scores_of(store: TokenStore, by: str, data: str | None, lengths: Int64Array) -> Float64Array:
    """Return the score of every document of ``store``.

    Args:
        store: one that keeps records.
        by: ``length``, a Parquet file, or the name of a number in the pipeline's metadata.
        data: folder of the pipeline; null looks beside the store.
        lengths: tokens of every document.

    Raises:
        ConfigError: there is neither such a file nor such a pipeline.
        DataError: a document has no score, two, or one that is no number.
    """
    if by == LENGTH:
        return lengths.astype(np.float64)
    known = _of_file(Path(by)) if by.endswith(".parquet") else _of_pipeline(store, by, data)
    ids, scores = _sorted_by_id(known, by)
    found = [
        _look_up(ids, scores, _strings(table.column("id")), by)
        for number in range(len(store.shards))
        for table in _batches(store.records_path(number), ["id"])
    ]
    result = np.concatenate(found)
    if not np.isfinite(result).all():
        bad = int(np.flatnonzero(~np.isfinite(result))[0])
        raise DataError(
            f"the score of document {store.record(bad).id} in by={by} is {result[bad]}; give every "
            "document a finite number"
        )
    return result


def source_of(store: TokenStore) -> str:
    """Return the name the pipeline knew the source of a store by: ids are made of it."""
    notes = {} if store.manifest is None else store.manifest.notes
    return str(notes.get("source", store.path.absolute().name))


def _of_file(path: Path) -> Iterator[pa.Table]:
    """Yield tables (id, score) of a Parquet file."""
    if not path.is_file():
        raise ConfigError(f"by={path} does not exist; give a Parquet file with id and score")
    names = pq.read_schema(path).names
    if missing := sorted({"id", "score"} - set(names)):
        raise DataError(
            f"by={path} has no column {missing[0]}, it has {', '.join(names)}; name the columns id "
            "and score"
        )
    yield from _batches(path, ["id", "score"])


def _of_pipeline(store: TokenStore, name: str, data: str | None) -> Iterator[pa.Table]:
    """Yield tables (id, score) of the documents that the last stage of a pipeline kept."""
    folder = store.path.absolute().parents[2] if data is None else Path(data)
    if not (folder / "pipeline.json").is_file():
        raise ConfigError(
            f"by={name} is a number of the data pipeline, and {folder} is no folder of one; give "
            "data=DIR that `llmtrain-data run` wrote, by=length or by=FILE.parquet"
        )
    source = source_of(store)
    for shard in read_folder(folder).kept:
        if shard.source != source:
            continue
        for table in read_batches(folder, shard, ["id", "metadata"]):
            values = pc.map_lookup(table.column("metadata"), name, "first")
            rows = pa.table({"id": table.column("id"), "score": values}).drop_null()
            yield rows.set_column(1, "score", _numbers(rows.column("score"), name))


def _numbers(values: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        return values.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise DataError(f"by={name} is no number in every document ({error})") from None


def _sorted_by_id(known: Iterator[pa.Table], by: str) -> tuple[Ids, Float64Array]:
    tables = [
        (_strings(table.column("id")), table.column("score").to_numpy().astype(np.float64))
        for table in known
        if table.num_rows
    ]
    if not tables:
        raise DataError(
            f"by={by} gives no document of the store a score; use length, FILE.parquet, or the "
            "number that a stage of the pipeline notes, as the stage quality does"
        )
    ids = np.concatenate([ids for ids, _ in tables])
    scores = np.concatenate([scores for _, scores in tables])
    order = np.argsort(ids)
    ids, scores = ids[order], scores[order]
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        raise DataError(
            f"by={by} has {len(twice):,} ids twice, the first is {ids[twice[0]].decode()}; give "
            "every document one score"
        )
    return ids, scores


def _look_up(ids: Ids, scores: Float64Array, wanted: Ids, by: str) -> Float64Array:
    places = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    missing = np.flatnonzero(ids[places] != wanted)
    if len(missing):
        raise DataError(
            f"by={by} has no score for document {wanted[missing[0]].decode()}; give every document "
            "of the store one"
        )
    return scores[places]


def _strings(column: pa.ChunkedArray) -> Ids:
    return np.array(column.to_pylist(), dtype="S")


def _batches(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])
