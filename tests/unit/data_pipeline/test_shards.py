"""Shards: bytes that depend on the documents alone, row groups that bound memory, damage told."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.document import Document, identity
from data_pipeline.shards import (
    ROW_GROUP_BYTES,
    SCHEMA,
    from_table,
    read_batches,
    read_documents,
    to_table,
)
from data_pipeline.sink import Sink
from llmtrain.errors import DataError

QUARTER = ROW_GROUP_BYTES // 4
TEXTS = ["é" * (QUARTER // 2), "a" * QUARTER, "", "b" * (2 * ROW_GROUP_BYTES), "c", "d" * QUARTER]
DOCUMENTS = [
    Document(id=f"{i:032x}", source="s", text=text, edits=identity(text), metadata={"n": str(i)})
    for i, text in enumerate(TEXTS)
]


def write(out: Path, cut: int) -> Sink:
    sink = Sink(folder=out / "stages/00-s", stage="00-s", source="s", name="s")
    for start in range(0, len(DOCUMENTS), cut):
        sink.write_kept(to_table(DOCUMENTS[start : start + cut]))
    sink.close()
    return sink


def test_bytes_do_not_depend_on_how_documents_arrive(tmp_path: Path) -> None:
    shards = [write(tmp_path / str(cut), cut).result.shards[0] for cut in (1, 2, 4, 6)]
    assert len({shard.digest for shard in shards}) == 1
    assert shards[0].text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert shards[0].text_characters == sum(map(len, TEXTS))


def test_a_row_group_ends_with_the_document_that_fills_it(tmp_path: Path) -> None:
    (shard,) = write(tmp_path, 6).result.shards
    file = pq.ParquetFile(tmp_path / shard.path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [4, 2]
    batches = list(read_batches(tmp_path, shard))
    assert [batch.num_rows for batch in batches] == groups
    assert [d for batch in batches for d in from_table(batch)] == DOCUMENTS
    assert read_documents(tmp_path, shard) == DOCUMENTS


def test_shards_roll_at_their_size_and_dropped_documents_keep_their_reason(tmp_path: Path) -> None:
    sink = Sink(folder=tmp_path / "stages/00-s", stage="00-s", source="s", name="s", shard_bytes=8)
    for document in DOCUMENTS[4:] * 2:
        sink.write_kept(to_table([document]))
    sink.write_dropped(to_table(DOCUMENTS[:2]), ["a.b", "a.c"])
    result = sink.close()
    assert [Path(shard.path).stem for shard in result.shards] == ["s-000", "s-001"]
    table = pq.read_table(tmp_path / result.dropped[0].path)
    assert table.column("reason").to_pylist() == ["a.b", "a.c"]
    assert result.counts.dropped == {"a.b": 1, "a.c": 1}
    assert result.counts.characters_dropped == len(TEXTS[0]) + len(TEXTS[1])


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_never_read(tmp_path: Path, damage: str) -> None:
    (shard,) = write(tmp_path, 6).result.shards
    path = tmp_path / shard.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(DataError, match="missing" if damage == "remove" else "damaged"):
        next(read_batches(tmp_path, shard))


def test_no_document_is_a_table_too() -> None:
    assert to_table([]).schema.equals(SCHEMA)
