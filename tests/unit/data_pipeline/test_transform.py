"""Extraction of raw files: what is kept, what is dropped and why, and that ids are unique."""

import json
from pathlib import Path

import pytest

from data_pipeline.config import ExtractConfig, FieldsConfig
from data_pipeline.io import find_raw_files, fingerprint
from data_pipeline.manifest import TaskResult
from data_pipeline.shards import read_documents
from data_pipeline.transform import check_unique, extract_file
from llmtrain.errors import DataError

STAGE = "00-extract"


def extract(folder: Path, rows: list[dict[str, str]], **settings: int) -> TaskResult:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (file,) = map(fingerprint, find_raw_files({"s": str(path)}))
    return extract_file(
        folder / "stages" / STAGE, STAGE, 0, file, ExtractConfig(**settings), FieldsConfig()
    )


def test_text_over_190000_characters_is_dropped_before_any_other_rule(tmp_path: Path) -> None:
    result = extract(tmp_path, [{"text": "é" * 190_000}, {"text": "é" * 190_001}, {"text": " "}])
    result.counts.check(STAGE)
    assert result.counts.dropped == {"extract.too_long": 1, "extract.empty": 1}
    assert result.counts.characters_out == 190_000
    assert result.counts.bytes_out == 380_000


def test_shards_are_cut_by_their_bytes(tmp_path: Path) -> None:
    result = extract(tmp_path, [{"text": "ten bytes!"}] * 7, shard_bytes=25)
    assert [shard.rows for shard in result.shards] == [3, 3, 1]


def test_what_utf_8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    row = {"text": "a \ud800 b", "url": "\udfff.org", "timestamp": "\ud801"}
    (document,) = read_documents(tmp_path, extract(tmp_path, [row]).shards[0])
    assert (document.text, document.url, document.timestamp) == ("a ? b", "?.org", "?")


def test_an_id_stands_once_in_a_source() -> None:
    one, two = "ab" * 16, "cd" * 16
    check_unique([("s", "a", [one, two]), ("t", "b", [one])])
    with pytest.raises(DataError, match=f"source s holds the record {one} twice .again in c"):
        check_unique([("s", "a", [one, two]), ("t", "b", [one]), ("s", "c", [one])])
