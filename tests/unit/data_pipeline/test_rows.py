"""Text in JSONL, Parquet and datasets: every row is a document or is counted."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.document import Document
from data_pipeline.read.inputs import find_raw_files, fingerprint
from data_pipeline.read.rows import Unreadable, read_text_file
from llmtrain.errors import DataError

ROWS = [{"text": f"Line one of {i}.\nLine two.", "url": f"u/{i}", "key": f"k{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACK = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(PACK.get(path.suffix, bytes)(LINES))
    return path


def read(path: Path | str, **fields: object) -> list[Document | Unreadable]:
    (file,) = find_raw_files({"s": str(path)})
    return list(read_text_file(fingerprint(file), FieldsConfig(**fields)))  # type: ignore[arg-type]


def split(items: list[Document | Unreadable]) -> tuple[list[Document], list[Unreadable]]:
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Unreadable)]


@pytest.mark.parametrize("name", ["a.jsonl", *(f"a.jsonl{end}" for end in PACK), "a.parquet"])
def test_formats_give_the_same_documents(name: str, tmp_path: Path) -> None:
    documents = read(write(tmp_path, name), id="key")
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert [d.url for d in documents] == [row["url"] for row in ROWS]
    assert [d.id for d in documents] == [d.id for d in read(write(tmp_path, "b.jsonl"), id="key")]


@pytest.mark.parametrize("name", ["A.JSONL", *(f"A.JSONL{end.upper()}" for end in PACK)])
def test_case_of_an_ending_means_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACK.get(Path(name).suffix.lower(), bytes)(LINES))
    documents, lost = split(read(tmp_path / name))
    assert (len(documents), lost) == (len(ROWS), [])


def test_datasets_folder_is_read(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    documents = read(f"hf:{folder}")
    (file,) = map(fingerprint, find_raw_files({"s": f"hf:{folder}"}))
    assert file.size > sum(len(row["text"]) for row in ROWS)  # bytes, not rows
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    with pytest.raises(DataError, match="does not open as a dataset"):
        read(f"hf:{tmp_path / 'absent'}")


def test_ids_without_a_field_name_file_and_row(tmp_path: Path) -> None:
    first, again = read(write(tmp_path, "a.jsonl")), read(write(tmp_path, "b.jsonl"))
    assert [d.id for d in first] == [d.id for d in again]
    assert len({d.id for d in first}) == 3


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b'{"text": nul\n[1]\n{"text": 7}\n')
    documents = read(path)
    assert [d.reason for d in documents if isinstance(d, Unreadable)] == [
        "line is no JSON", "line is no JSON object", "field 'text' holds no text",
    ]  # fmt: skip
    assert sum(isinstance(d, Document) for d in documents) == 3


def test_rows_are_numbered_by_the_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    nested = b"[" * 100_000
    path.write_bytes(b"\n" + LINES.replace(b"\n", b"\n\n") + nested)
    found = read(path)
    assert [d.member_offset for d in found if isinstance(d, Document)] == [1, 3, 5]
    assert found[3] == Unreadable(7, len(nested), "line is no JSON")


@pytest.mark.parametrize("suffix", PACK)
def test_cut_stream_is_refused(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"a.jsonl{suffix}")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="is cut or damaged"):
        read(path)


def test_wrong_field_names_the_fields_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no field 'content'; its fields are key, text, url"):
        read(write(tmp_path, "a.jsonl"), text="content")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("field", ["id", "url", "timestamp"])
def test_optional_field_that_is_named_has_to_be_there(
    field: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"no field 'nope'; its fields are .*{field}="):
        read(write(tmp_path, name), **{field: "nope"})


def members(suffix: str) -> list[bytes]:
    """Three members of two rows each; the second begins and ends inside a line."""
    lines = [json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(6)]
    whole = b"".join(lines)
    first, second = len(lines[0]) * 2 - 4, len(lines[0]) * 4 - 4
    return [PACK[suffix](part) for part in (whole[:first], whole[first:second], whole[second:])]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_lines_go_on_across_members_and_a_damaged_one_costs_itself(
    suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    parts = members(suffix)
    path.write_bytes(b"".join(parts))
    documents, lost = split(read(path))
    assert [d.text for d in documents] == [f"row {i}" for i in range(6)]
    assert lost == []
    middle = bytearray(parts[1])
    middle[len(middle) // 2] ^= 0xFF
    path.write_bytes(parts[0] + bytes(middle) + parts[2])
    documents, lost = split(read(path))
    assert [d.text for d in documents] == ["row 0", "row 4", "row 5"]
    damaged = [item for item in lost if "damaged" in item.reason]
    assert [(d.offset, d.length) for d in damaged] == [(len(parts[0]), len(middle))]
    # The two pieces of lines that the damage has cut are counted each by itself.
    assert [item.reason for item in lost if item not in damaged] == ["line is no JSON"] * 2
    assert len({d.id for d in documents}) == 3


def test_damage_with_nothing_whole_beside_it_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is cut or damaged .* at byte 0"):
        read(path)


def test_a_line_that_is_too_long_is_counted_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 2_000_000}).encode()
    path.write_bytes(LINES + long + b"\n" + LINES)
    (file,) = find_raw_files({"s": str(path)})
    documents, lost = split(list(read_text_file(fingerprint(file), FieldsConfig(), 1_000_000)))
    assert [d.member_offset for d in documents] == [0, 1, 2, 4, 5, 6]
    reason = f"line has {len(long)} bytes, more than max_record_bytes=1000000"
    assert lost == [Unreadable(3, len(long), reason)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_further_fields_become_metadata(name: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "title": "T", "tags": ["x", "é"], "n": 1}, {"text": "b", "title": None}]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, _ = split(read(path, metadata=("title", "tags", "n")))
    assert [d.metadata for d in documents] == [{"title": "T", "tags": '["x", "é"]', "n": "1"}, {}]
    with pytest.raises(DataError, match=r"no field 'nope'; .*pipeline\.fields\.metadata="):
        read(path, metadata=("title", "nope"))


def test_a_row_group_that_does_not_read_is_counted_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": f"{i} " * 400} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="zstd")
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place : place + 40] = bytes(40)
    path.write_bytes(content)
    documents, lost = split(read(path))
    assert [d.member_offset for d in documents] == [*range(10), *range(20, 30)]
    assert [(item.offset, item.records) for item in lost] == [(10, 10)]
    assert lost[0].reason.startswith("row group 1, rows 10 to 19: does not read")


def test_text_in_parquet_that_is_no_utf_8_costs_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    broken = pa.array([b"fine", b"not \xff fine", b"fine too"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), path)
    documents, lost = split(read(path))
    assert [(d.member_offset, d.text) for d in documents] == [(0, "fine"), (2, "fine too")]
    assert [item.offset for item in lost] == [1]
    assert lost[0].reason.startswith("row does not decode")


def test_a_parquet_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(DataError, match="does not read as Parquet"):
        read(path)
