"""Pages leave and enter the columns of a shard without a trace of the detour."""

import pyarrow as pa
import pytest

from data_pipeline.columns import pages_of, with_pages
from data_pipeline.document import Document, Extractor, Run, identity
from data_pipeline.shards import from_table, to_table

DOCUMENTS = [
    Document(
        id=f"{i}", source="web", text=text, url=f"http://x/{i}", timestamp="2024-01-01T00:00:00Z",
        source_file_id="f" * 64, member_offset=i, member_length=7, payload_sha256="a" * 64,
        extractor=Extractor(name="resiliparse", version="2"), extracted_sha256="b" * 64,
        edits=edits, language="de", language_score=0.5, cluster="c", cluster_size=i + 1,
        metadata={"title": "t", "date": "d"},
    )
    for i, (text, edits) in enumerate(
        [
            ("one two three", identity("one two three")),
            ("äöü x", (Run(0, 10, 3), Run(3, 20, 2))),
            ("", ()),
            ("one two", identity("one two")),
        ]
    )
]  # fmt: skip
TABLE = to_table(DOCUMENTS)


def test_pages_are_documents_without_edits_or_origin() -> None:
    for page, document in zip(pages_of(TABLE), DOCUMENTS, strict=True):
        assert (page.id, page.text, page.url) == (document.id, document.text, document.url)
        assert (page.language, page.metadata) == (document.language, document.metadata)
        assert page.edits == identity(document.text)
        assert (page.cluster, page.member_offset) == ("", 0)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3], []])
def test_pages_that_nobody_changed_leave_their_rows_as_they_are(rows: list[int]) -> None:
    pages = [pages_of(TABLE)[row] for row in rows]
    assert with_pages(TABLE, rows, pages, pages, {}).equals(TABLE.take(pa.array(rows, pa.int64())))


@pytest.mark.parametrize("start", [0, 1])
def test_changed_pages_are_what_changed_documents_are(start: int) -> None:
    table = to_table([*DOCUMENTS[:start], *DOCUMENTS]).slice(start)
    before = [pages_of(table)[row] for row in (0, 1, 2)]
    first = before[0].edited("one three", [Run(0, 0, 4), Run(4, 8, 5)])
    second = before[1].edited("ä\nx", [Run(0, 0, 1), Run(2, 4, 1)])
    after = [
        first.changed(metadata={"title": "t", "score": "1", "date": "d"}, language="en"),
        second,
        before[2],
    ]
    result = with_pages(table, [0, 1, 2], before, after, {0: first.edits, 1: second.edits})
    expected = [
        DOCUMENTS[0].changed(
            text="one three", edits=(Run(0, 0, 4), Run(4, 8, 5)), language="en",
            metadata={"date": "d", "score": "1", "title": "t"},
        ),
        DOCUMENTS[1].changed(text="ä\nx", edits=(Run(0, 10, 1), Run(2, 21, 1))),
        DOCUMENTS[2],
    ]  # fmt: skip
    assert from_table(result) == expected
    assert result.equals(to_table(expected))
