"""Extraction of raw files: what is kept, dropped or quarantined, and that ids are unique."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_pipeline.config.extract import ExtractConfig, FieldsConfig, TrafilaturaConfig
from data_pipeline.manifest import TaskResult
from data_pipeline.read import extract_task
from data_pipeline.read.extract_task import check_unique, extract_file, extract_settings
from data_pipeline.read.inputs import find_raw_files, fingerprint
from data_pipeline.read.warc import Record, read_member
from data_pipeline.shards import read_documents
from data_pipeline.sink import Sink
from llmtrain.errors import DataError
from tests.crawl import pages, write_warc

STAGE = "00-extract"


def extract_input(folder: Path, given: str, **settings: Any) -> TaskResult:
    """Extract the one raw file that ``given`` stands for; its counts balance."""
    (file,) = map(fingerprint, find_raw_files({"s": given}))
    result = extract_file(
        folder / "stages" / STAGE, STAGE, 0, file, ExtractConfig(**settings), FieldsConfig()
    )
    result.counts.check(STAGE)
    return result


def extract(folder: Path, rows: list[dict[str, str]], **settings: Any) -> TaskResult:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return extract_input(folder, str(path), **settings)


def quarantined(folder: Path, result: TaskResult) -> list[dict[str, Any]]:
    (name,) = result.files
    lines = (folder / "stages" / STAGE / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_text_over_190000_characters_is_dropped_before_any_other_rule(tmp_path: Path) -> None:
    result = extract(tmp_path, [{"text": "é" * 190_000}, {"text": "é" * 190_001}, {"text": " "}])
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


def test_how_much_is_gathered_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{i} " * (i % 40), "url": f"u/{i}"} for i in range(200)]
    settings = {"shard_bytes": 5000, "max_characters": 100}
    reference = extract(tmp_path, rows, **settings)
    assert len(reference.shards) > 1
    assert reference.counts.dropped == {"extract.empty": 5, "extract.too_long": 54}
    written: list[int] = []
    for write in ("write_kept", "write_dropped"):
        original = getattr(Sink, write)

        def noting(self: Sink, table: pa.Table, *more: Any, original: Any = original) -> None:
            written.append(table.num_rows)
            original(self, table, *more)

        monkeypatch.setattr(Sink, write, noting)
    monkeypatch.setattr(extract_task, "BATCH_BYTES", 4000)
    again = extract(tmp_path, rows, **settings)
    assert max(written) < 10
    assert again.as_dict() == reference.as_dict()


def test_a_crawl_becomes_documents_with_their_origin(tmp_path: Path) -> None:
    path = tmp_path / "c.warc.gz"
    write_warc(path, seed=0, number=40)
    expected = pages(seed=0, number=40)
    result = extract_input(tmp_path, str(path))
    ok = [url for url, _, status, _ in expected if status.startswith("200")]
    assert result.counts.dropped == {"extract.http_status": 40 - len(ok)}
    documents = read_documents(tmp_path, result.shards[0])
    assert [d.url for d in documents] == ok
    assert {d.metadata["title"] for d in documents} == {"Stories"}
    for document in documents[:3]:
        (record,) = read_member(path, document.member_offset, document.member_length)
        assert isinstance(record, Record)
        assert record.url == document.url


def test_what_cannot_be_read_is_noted_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "c.warc.gz"
    write_warc(path, seed=5, number=10)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    result = extract_input(tmp_path, str(path))
    assert result.counts.quarantined == {"extract.unreadable": 1}
    (entry,) = quarantined(tmp_path, result)
    assert entry["file"] == "c.warc.gz"
    assert 0 < entry["offset"] < len(content) // 2 < entry["offset"] + entry["length"]
    assert entry["reason"].startswith("gzip member is damaged")


@pytest.mark.parametrize("packed", [True, False])
def test_records_that_are_too_long_are_quarantined_and_no_others(
    packed: bool, tmp_path: Path
) -> None:
    path = tmp_path / "c.warc"
    write_warc(path, seed=5, number=10, gzip=False)
    content = path.read_bytes()
    start = content.index(b"WARC/1.", content.index(b"<urn:test:5:4>") - 400)
    long = b"<p>" + b"x" * 300_000
    header = (
        b"WARC/1.0\r\nWARC-Type: resource\r\nWARC-Record-ID: <urn:long>\r\n"
        b"Content-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(long)
    )
    content = content[:start] + header + long + b"\r\n\r\n" + content[start:]
    if packed:
        path = tmp_path / "c.warc.gz"
        content = gzip.compress(content, mtime=0)
    path.write_bytes(content)
    result = extract_input(tmp_path, str(path), max_record_bytes=100_000)
    (entry,) = quarantined(tmp_path, result)
    assert entry["reason"].endswith("bytes, more than max_record_bytes=100000")
    assert result.counts.documents_in == 11
    whole = extract_input(tmp_path, str(path), max_characters=1_000_000)
    assert whole.counts.quarantined == {}
    assert whole.counts.documents_in == 11


def test_a_folder_of_pages_becomes_documents(tmp_path: Path) -> None:
    folder = tmp_path / "manual"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.html").write_text("<title>A</title><main><p>Page <b>one</b>.</p></main>")
    (folder / "sub" / "b ü.md").write_text("# Heading\n\ntext")
    (folder / "c.py").write_text("def c(): ...\n")
    (folder / "d.txt").write_bytes("Übung".encode("utf-16"))
    (folder / "e.txt").write_bytes(b"binary \0 thing")
    (folder / "f.txt").write_text("x" * 2000)
    result = extract_input(tmp_path, str(folder), max_record_bytes=1000)
    found = {d.url: d for d in read_documents(tmp_path, result.shards[0])}
    assert {url: (d.text, d.metadata) for url, d in found.items()} == {
        "file:///s/a.html": ("Page one.", {"kind": "html", "title": "A"}),
        "file:///s/sub/b%20%C3%BC.md": ("# Heading\n\ntext", {"kind": "markdown"}),
        "file:///s/c.py": ("def c(): ...\n", {"kind": "code", "code_language": "python"}),
        "file:///s/d.txt": ("Übung", {"kind": "text"}),
    }
    assert result.counts.dropped == {"extract.not_text": 1}
    (entry,) = quarantined(tmp_path, result)
    assert entry["reason"] == "f.txt has 2000 bytes, more than max_record_bytes=1000"
    moved = folder.rename(tmp_path / "moved")
    again = extract_input(tmp_path, str(moved), max_record_bytes=1000)
    assert [d.id for d in read_documents(tmp_path, again.shards[0])] == [
        d.id for d in found.values()
    ]


def test_pages_that_changed_since_they_were_fingerprinted_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("before")
    (file,) = map(fingerprint, find_raw_files({"s": str(tmp_path)}))
    (tmp_path / "a.md").write_text("after!")
    with pytest.raises(DataError, match="have changed since the run began"):
        extract_file(tmp_path / "out", STAGE, 0, file, ExtractConfig(), FieldsConfig())


@pytest.mark.parametrize("name", ["c.warc.gz", "rows.jsonl.gz"])
def test_a_remote_file_gives_what_the_local_one_gives(name: str, tmp_path: Path) -> None:
    import fsspec

    path = tmp_path / name
    if name == "c.warc.gz":
        write_warc(path, seed=5, number=10)
    else:
        path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": "b"}\nno\n', mtime=0))
    local = extract_input(tmp_path, str(path))
    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{name}", path.read_bytes())
    remote = extract_input(tmp_path, f"memory://{name}")
    memory.rm(f"/{name}")
    assert remote.as_dict() == local.as_dict()
    assert not list((tmp_path / "stages" / STAGE).glob("input-*"))


def test_an_id_stands_once_in_a_source() -> None:
    one, two, three = "ab" * 16, "cd" * 16, "ab" * 15 + "ac"
    check_unique([])
    check_unique([("s", "a", [one, two, three]), ("t", "b", [one]), ("t", "c", [])])
    with pytest.raises(DataError, match=f"source s holds the record {one} twice .again in c"):
        check_unique([("s", "a", [two, one]), ("t", "b", [one]), ("s", "c", [three, one, two])])
    with pytest.raises(DataError, match=f"source s holds the record {two} twice .again in a"):
        check_unique([("s", "a", [two, one, two]), ("s", "c", [one])])


def test_a_page_that_takes_trafilatura_too_long_is_dropped_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    line = "<p>A paragraph that is long enough to be taken for the content of a page.</p>"
    (folder / "a.html").write_text(f"<article>{line * 20_000}</article>")
    (folder / "b.html").write_text(f"<article>{line * 5}</article>")
    result = extract_input(
        tmp_path, str(folder), extractor="trafilatura", trafilatura=TrafilaturaConfig(limit_s=0.3)
    )
    assert result.counts.dropped == {"extract.timed_out": 1}
    (document,) = read_documents(tmp_path, result.shards[0])
    assert document.text.count("A paragraph that is long enough") >= 1
    assert document.extractor.name == "trafilatura"


def test_the_manifest_names_what_made_the_text() -> None:
    settings = extract_settings(ExtractConfig(extractor="union"), FieldsConfig())
    assert settings["extract"]["extractor"] == "union"
    assert settings["extractor"]["name"] == "union"
    assert "trafilatura" in settings["extractor"]["version"]
