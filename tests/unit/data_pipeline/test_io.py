"""What inputs mean, and text in JSONL, Parquet and datasets."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.config import FieldsConfig
from data_pipeline.document import Document
from data_pipeline.io import (
    RawFile,
    Unreadable,
    find_raw_files,
    fingerprint,
    read_text_file,
)
from llmtrain.errors import DataError

ROWS = [{"text": f"Line one of {i}.\nLine two.", "url": f"u/{i}", "key": f"k{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(LINES))
    return path


def read(path: Path | str, **fields: str) -> list[Document | Unreadable]:
    (file,) = find_raw_files({"s": str(path)})
    return list(read_text_file(fingerprint(file), FieldsConfig(**fields)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_formats_give_the_same_documents(name: str, tmp_path: Path) -> None:
    documents = read(write(tmp_path, name), id="key")
    assert [d.text for d in documents] == [row["text"] for row in ROWS]
    assert [d.url for d in documents] == [row["url"] for row in ROWS]
    assert [d.id for d in documents] == [d.id for d in read(write(tmp_path, "b.jsonl"), id="key")]


def test_datasets_folder_is_read(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    documents = read(f"hf:{folder}")
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


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
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


def test_inputs_resolve_to_sorted_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.warc.gz"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "notes.txt").write_text("no input")
    names = [Path(f.path).name for f in find_raw_files({"s": str(tmp_path)})]
    assert names == ["a.jsonl", "b.jsonl", "c.warc.gz"]
    files = find_raw_files({"y": f"{tmp_path}/*.jsonl", "x": (f"{tmp_path}/c.warc.gz",)})
    assert [(f.source, f.format) for f in files] == [("x", "warc"), ("y", "jsonl"), ("y", "jsonl")]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no input given"),
        ({"s": "absent/*.warc.gz"}, "matches no file"),
        ({"s": __file__}, "is of no known kind"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_raw_files(inputs)


def test_file_named_twice_is_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path, "a.jsonl"))
    with pytest.raises(DataError, match="twice"):
        find_raw_files({"s": (path, path)})


def test_names_in_manifests_hold_no_folder(tmp_path: Path) -> None:
    assert RawFile(source="s", path=str(tmp_path / "a.jsonl"), format="jsonl").name == "a.jsonl"
