"""Records survive the file, and a span of tokens leads back to the extracted text."""

from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.data import lineage
from llmtrain.data.lineage import (
    DocumentRecord,
    RecordWriter,
    decode_edits,
    encode_edits,
    iterate_records,
    read_counts,
    read_record,
    read_records,
    text_span,
)
from llmtrain.errors import DataError

EXTRACTED = "Menu\nFirst line.[1] It goes on.\nshare this\nLast line."
FINAL = "First line. It goes on.\nLast line."
EDITS = ((0, 5, 11), (11, 19, 13), (24, 43, 10))


def record(number: int) -> DocumentRecord:
    return DocumentRecord(
        id=f"{number:032x}",
        url="https://example.org/é",
        source_file_id="ab" * 32,
        member_offset=1 << 40,
        member_length=77,
        payload_sha256="cd" * 32,
        extractor_name="resiliparse",
        extractor_version="2.0",
        extractor_options='{"main": true}',
        extracted_sha256="ef" * 32,
        text_bytes=len(FINAL),
        num_tokens=number + 1,
        cluster="00",
        language="en",
        edits=EDITS,
    )


def test_edit_map_of_the_example_holds() -> None:
    for final, extracted, length in EDITS:
        assert FINAL[final : final + length] == EXTRACTED[extracted : extracted + length]


@pytest.mark.parametrize("span", [(0, 5), (8, 14), (20, 30), (23, 24), (30, 34), (0, 34)])
def test_resolve_gives_the_same_characters(span: tuple[int, int]) -> None:
    spans = record(0).resolve(*span)
    assert "".join(EXTRACTED[low:high] for low, high in spans) == FINAL[slice(*span)]


def test_resolve_leaves_inserted_characters_out() -> None:
    edits = ((2, 0, 3), (10, 5, 4))
    inserted = replace(record(0), edits=edits)
    assert inserted.resolve(0, 2) == []
    assert inserted.resolve(5, 10) == []
    assert inserted.resolve(4, 11) == [(2, 3), (5, 6)]
    assert replace(record(0), edits=()).resolve(0, 5) == []


@pytest.mark.parametrize("edits", [(), EDITS, ((3, 0, 1),), ((0, 190_000, 5),)])
def test_edits_survive_their_encoding(edits: tuple[tuple[int, int, int], ...]) -> None:
    assert decode_edits(encode_edits(edits)) == edits


def test_records_survive_the_file_over_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage, "ROWS_PER_GROUP", 4)
    path = tmp_path / "part-00000.docs.parquet"
    records = [replace(record(0), num_tokens=i + 1) for i in range(7)]
    writer = RecordWriter(path)
    for one in records:
        writer.add(one, one.num_tokens)
    writer.close()
    assert read_records(path) == records
    assert next(iterate_records(path)) == records[0]
    assert [read_record(path, i) for i in range(7)] == records
    assert read_counts(path).sum() == sum(one.num_tokens for one in records)
    with pytest.raises(DataError, match="is outside"):
        read_record(path, len(records))


def test_store_without_origins(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stores of other programs have none"):
        read_records(tmp_path / "part-00000.docs.parquet")


def test_token_span_covers_characters_spelled_in_bytes() -> None:
    text = "aé\U0001f600b"
    raw = text.encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    ids = list(raw)
    covered = [text[slice(*text_span(ids, i, i + 1, decode))] for i in range(len(ids))]
    assert covered == ["a", "é", "é", *["\U0001f600"] * 4, "b"]
    assert text_span(ids, 0, len(ids), decode) == (0, len(text))
