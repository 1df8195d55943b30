"""Raw records opened again: proven where nothing has changed, and told apart where it has."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config.extract import ExtractConfig, FieldsConfig, TrafilaturaConfig
from data_pipeline.document import Document, Extractor
from data_pipeline.folder import fingerprints
from data_pipeline.read import inputs
from data_pipeline.read.extract_task import extract_file
from data_pipeline.read.inputs import find_raw_files
from data_pipeline.read.raw_files import RawFiles
from data_pipeline.read.reopen import Answer, Reopener, Request
from data_pipeline.shards import read_documents
from llmtrain.errors import DataError
from tests.crawl import write_warc

ROWS = [{"body": f"Row {i} has a text.\nAnd a second line.", "key": f"k{i}"} for i in range(5)]


def made(
    out: Path, given: Path | str, fields: FieldsConfig | None = None, **extract: object
) -> list[Document]:
    """Documents of an input, read into the folder ``out`` as the pipeline does."""
    out.mkdir(exist_ok=True)
    config = ExtractConfig(**extract)  # type: ignore[arg-type]
    documents: list[Document] = []
    for i, file in enumerate(fingerprints(out, find_raw_files({"s": str(given)}))):
        place = out / "stages" / "00-extract"
        result = extract_file(place, "00-extract", i, file, config, fields or FieldsConfig())
        documents += [d for shard in result.shards for d in read_documents(out, shard)]
    return documents


def request(document: Document, *spans: tuple[int, int]) -> Request:
    """What a store would ask of a document."""
    return Request(
        id=document.id, source=document.source, source_file_id=document.source_file_id,
        member_offset=document.member_offset, member_length=document.member_length,
        payload_sha256=document.payload_sha256, extracted_sha256=document.extracted_sha256,
        extractor=document.extractor, url=document.url, spans=spans,
    )  # fmt: skip


def answers(
    out: Path | None, requests: list[Request], *raw: Path, fields: FieldsConfig | None = None
) -> list[Answer]:
    """Answers in the order of the requests."""
    files = RawFiles(out, [str(path) for path in raw])
    with Reopener(files=files, fields=fields or FieldsConfig()) as reopener:
        found = {asked.id: answer for asked, answer in reopener.reopen(requests)}
    return [found[asked.id] for asked in requests]


def all_proven(documents: list[Document], found: list[Answer]) -> bool:
    """Whether every answer holds the first ten characters and the last three of its document."""
    expected = [(d.text[:10], d.text[-3:]) for d in documents]
    assert [answer.problem for answer in found] == [""] * len(documents)
    return [answer.texts for answer in found] == expected


def ends(documents: list[Document]) -> list[Request]:
    return [request(d, (0, 10), (len(d.text) - 3, len(d.text))) for d in documents]


@pytest.fixture
def crawl(tmp_path: Path) -> Path:
    path = tmp_path / "c.warc.gz"
    write_warc(path, seed=3, number=12)
    return path


def test_records_of_a_crawl_are_proven_in_any_order(crawl: Path, tmp_path: Path) -> None:
    documents = made(tmp_path / "out", crawl)[::-1]
    assert len(documents) > 8
    assert all_proven(documents, answers(tmp_path / "out", ends(documents)))


def test_one_member_may_hold_many_records(crawl: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.warc.gz"
    whole.write_bytes(gzip.compress(gzip.decompress(crawl.read_bytes())))
    documents = made(tmp_path / "out", whole)
    assert {d.member_offset for d in documents} == {0}
    assert all_proven(documents, answers(tmp_path / "out", ends(documents)))
    plain = tmp_path / "plain.warc"
    plain.write_bytes(gzip.decompress(crawl.read_bytes()))
    documents = made(tmp_path / "other", plain)
    assert all_proven(documents, answers(tmp_path / "other", ends(documents)))


@pytest.mark.parametrize("extractor", ["trafilatura", "union"])
def test_every_extractor_is_started_with_the_options_it_had(
    crawl: Path, tmp_path: Path, extractor: str
) -> None:
    settings = TrafilaturaConfig(favor="recall", tables=False)
    documents = made(tmp_path / "out", crawl, extractor=extractor, trafilatura=settings)
    assert documents[0].extractor.name == extractor
    assert all_proven(documents, answers(tmp_path / "out", ends(documents)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("id_field", [None, "key"])
def test_rows_are_found_by_their_number(tmp_path: Path, name: str, id_field: str | None) -> None:
    path = tmp_path / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    fields = FieldsConfig(text="body", id=id_field)
    documents = made(tmp_path / "out", path, fields)[3:0:-1]
    found = answers(tmp_path / "out", ends(documents), fields=fields)
    assert all_proven(documents, found)


def test_a_dataset_is_found_by_its_name(tmp_path: Path) -> None:
    import datasets

    rows = [{"text": row["body"]} for row in ROWS]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "set"))
    documents = made(tmp_path / "out", f"hf:{tmp_path / 'set'}")
    assert all_proven(documents, answers(tmp_path / "out", ends(documents)))


def test_single_pages_are_found_by_their_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "GROUP_FILES", 2)
    pages = tmp_path / "manual"
    (pages / "über uns").mkdir(parents=True)
    (pages / "a.md").write_text("# First\n\nA page of text.\n")
    (pages / "b.html").write_text("<main><p>A page with a <b>paragraph</b> in it.</p></main>")
    (pages / "über uns" / "c d.txt").write_text("Another page.\n")
    documents = made(tmp_path / "out", pages)
    assert len(documents) == 3
    assert all_proven(documents, answers(tmp_path / "out", ends(documents)))
    shutil.move(pages, tmp_path / "moved")
    lost = answers(tmp_path / "out", ends(documents))
    assert all("give raw=DIR" in answer.problem for answer in lost)
    assert all_proven(documents, answers(tmp_path / "out", ends(documents), tmp_path / "moved"))


def test_a_tree_that_was_moved_as_a_whole_is_found(
    crawl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "before" / "demo"
    place.mkdir(parents=True)
    shutil.move(crawl, place / "c.warc.gz")
    monkeypatch.chdir(place.parent)
    documents = made(Path("demo/out"), "demo/c.warc.gz")
    shutil.move(place, tmp_path / "demo")
    monkeypatch.chdir(place.parent)
    assert all_proven(documents, answers(tmp_path / "demo" / "out", ends(documents)))


def test_a_file_that_was_moved_is_found_by_its_digest(crawl: Path, tmp_path: Path) -> None:
    documents = made(tmp_path / "out", crawl)[:2]
    (tmp_path / "archive").mkdir()
    crawl.rename(tmp_path / "archive" / "renamed.warc.gz")
    write_warc(tmp_path / "archive" / "c.warc.gz", seed=4, number=12)
    (lost, _) = answers(tmp_path / "out", ends(documents))
    assert "c.warc.gz; it is not there now as it was then: give raw=DIR" in lost.problem
    assert all_proven(documents, answers(tmp_path / "out", ends(documents), tmp_path / "archive"))
    assert all_proven(documents, answers(None, ends(documents), tmp_path / "archive"))


def test_what_changed_is_said(crawl: Path, tmp_path: Path) -> None:
    document, other = made(tmp_path / "out", crawl)[:2]
    asked = request(document)
    newer = Extractor(name="resiliparse", version="9.9", options=asked.extractor.options)
    unknown = Extractor(name="mine", version="1.0")
    cases = {
        "the payload has sha256": replace(asked, payload_sha256="0" * 64),
        "the text extracted now has sha256": replace(asked, extracted_sha256="0" * 64),
        "made by resiliparse 9.9, installed is": replace(asked, extractor=newer),
        "uses": replace(asked, extractor=replace(asked.extractor, options="{}")),
        "made by mine 1.0, which is not known here": replace(asked, extractor=unknown),
        "the page there has another id": replace(asked, member_offset=other.member_offset),
        "no WARC header where a record should begin": replace(
            asked, member_offset=asked.member_offset + 20
        ),
    }
    for expected, wrong in cases.items():
        (answer,) = answers(tmp_path / "out", [wrong])
        assert expected in answer.problem
        assert answer.texts == ()


def test_a_row_that_is_another_now_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fields = FieldsConfig(text="body", id="key")
    document = made(tmp_path / "out", path, fields)[2]
    (answer,) = answers(
        tmp_path / "out", [replace(request(document), member_offset=1)], fields=fields
    )
    assert answer.problem == "its raw file holds no such record"
    path.write_text(path.read_text().replace("Row 2", "Row 9"))
    (answer,) = answers(tmp_path / "out", [request(document)], fields=fields)
    assert "the text extracted now has sha256" in answer.problem


def test_damaged_notes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(DataError, match="is damaged; put it back"):
        RawFiles(tmp_path)
