"""Text of payloads: what resiliparse makes of blocks, encodings, and what has no text."""

import codecs
import json

import pytest

from data_pipeline.read.encoding import decode, has_mark
from data_pipeline.read.extract import (
    EXTRACTOR,
    MAX_DEPTH,
    NO_EXTRACTOR,
    Extracted,
    media_kind,
    payload_text,
)
from data_pipeline.read.page_metadata import parse_date
from data_pipeline.step import Dropped

PAGE = """<!doctype html><html><head><title>T</title></head><body>
<nav><a href="/">Home</a> <a href="/b">More</a></nav>
<main><h1>A heading</h1><p>The first paragraph, wrapped
over two lines &amp; <b>bold</b>.</p><p>The second.<br>After a break.</p>
<pre>&gt;&gt;&gt; x = 1
    indented
</pre><p>A list follows here:</p><ol><li>one item of it</li><li>another item of it</li></ol>
<table><tr><th>Name</th><th>Value</th></tr><tr><td>one</td><td>1</td></tr></table>
<script>var hidden = "script";</script><!-- comment --></main>
<footer>Footer text</footer></body></html>"""


def text_of(payload: bytes) -> str:
    extracted = payload_text(payload, "text/html; charset=utf-8")
    assert isinstance(extracted, Extracted)
    return extracted.text


def test_blocks_come_out_as_lines_without_what_surrounds_the_content() -> None:
    text = text_of(PAGE.encode())
    assert text.splitlines() == [
        "A heading",
        "",
        "The first paragraph, wrapped over two lines & bold.",
        "",
        "The second.",
        "After a break.",
        "",
        ">>> x = 1",
        "    indented",
        "",
        "A list follows here:",
        "",
        "  1. one item of it",
        "  2. another item of it",
        "Name\t\tValue",
        "one\t\t1",
    ]


def test_the_same_payload_gives_the_same_text() -> None:
    first = payload_text(PAGE.encode(), "text/html")
    assert isinstance(first, Extracted)
    assert first == payload_text(PAGE.encode(), "text/html")
    assert first.extractor == EXTRACTOR
    assert EXTRACTOR.version
    assert EXTRACTOR.options == json.dumps(
        json.loads(EXTRACTOR.options), sort_keys=True, separators=(",", ":")
    )


WORDS = "Ein schöner, großer Tag für Übungen. "


@pytest.mark.parametrize(
    ("payload", "content_type"),
    [
        (WORDS.encode("latin-1"), "text/html; charset=ISO-8859-1"),
        (WORDS.encode("latin-1"), 'text/html; charset="iso-8859-1"'),
        (b'<meta charset="windows-1252">' + WORDS.encode("cp1252"), "text/html"),
        (
            b'<meta http-equiv=Content-Type content="text/html; charset=latin1">'
            + WORDS.encode("latin-1"),
            "text/html",
        ),
        (b"<?xml version='1.0' encoding='iso-8859-1'?>" + WORDS.encode("latin-1"), "text/html"),
        (WORDS.encode(), "text/html"),
        (WORDS.encode(), "text/html; charset=no-such-thing"),
        (WORDS.encode(), "text/html; charset=us-ascii"),
        (WORDS.encode(), "text/html; charset=euc-kr"),
        (WORDS.encode() * 20, "text/html; charset=utf-16"),
        (codecs.BOM_UTF8 + WORDS.encode(), "text/html; charset=latin-1"),
        (codecs.BOM_UTF16_LE + WORDS.encode("utf-16-le"), "text/html"),
        (codecs.BOM_UTF16_BE + WORDS.encode("utf-16-be"), "text/html; charset=utf-8"),
        ((WORDS * 20).encode("cp1252"), "text/html"),
    ],
)
def test_the_encoding_is_found(payload: bytes, content_type: str) -> None:
    assert WORDS.strip() in decode(payload, content_type)


def test_other_scripts_by_declaration_and_by_detection() -> None:
    russian = "Все счастливые семьи похожи друг на друга. " * 20
    assert decode(russian.encode("cp1251"), "text/html") == russian
    japanese = "すべての幸せな家庭は互いに似ている。" * 20
    assert decode(japanese.encode("shift_jis"), "text/html; charset=Shift_JIS") == japanese
    assert decode(japanese.encode("euc-jp"), "text/html") == japanese


def test_what_means_nothing_becomes_the_replacement_character() -> None:
    text = decode(b"ab\xff\xfecd \xc3", "text/html; charset=utf-8")
    assert (
        text == "ab\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}cd \N{REPLACEMENT CHARACTER}"
    )
    surrogate = text_of(b"<p>a&#xD800;b&#0;c\x00d</p>")
    assert surrogate.encode("utf-8")
    assert "\x00" not in surrogate


def test_plain_text_passes_as_it_is() -> None:
    text = "  First line.\r\n\tSecond <b>line</b>. \n"
    extracted = payload_text(text.encode(), "text/plain")
    assert extracted == Extracted(text, NO_EXTRACTOR)


@pytest.mark.parametrize(
    ("payload", "content_type", "kind"),
    [
        (b"x", "text/html; charset=utf-8", "html"),
        (b"x", "TEXT/HTML", "html"),
        (b"x", "application/xhtml+xml", "html"),
        (b"x", "text/plain;charset=ascii", "text"),
        (b"<!DOCTYPE html><p>x", "", "html"),
        (b"\n <!-- note --><html><p>x", "application/octet-stream", "html"),
        (b"just text", "", "other"),
        (b"%PDF-1.4 <html>", "application/pdf", "other"),
        (b'{"a": 1}', "application/json", "other"),
    ],
)
def test_kind_of_payload(payload: bytes, content_type: str, kind: str) -> None:
    assert media_kind(payload, content_type) == kind


def test_reasons_for_having_no_text() -> None:
    assert payload_text(b"\x89PNG", "image/png") == Dropped("extract.not_text")
    assert payload_text(b"<html><body> </body></html>", "text/html") == Dropped("extract.empty")
    assert payload_text(b" \n", "text/plain") == Dropped("extract.empty")
    assert payload_text(b"", "text/html") == Dropped("extract.empty")


def test_nesting_that_would_take_for_ever_is_dropped_and_long_flat_pages_are_not() -> None:
    deep = b"<div>" * (MAX_DEPTH + 1) + b"text"
    assert payload_text(deep, "text/html") == Dropped("extract.too_deep")
    flat = b"<main>" + b"<p>Some text here.<br>" * (3 * MAX_DEPTH) + b"</main>"
    assert isinstance(payload_text(flat, "text/html"), Extracted)
    spans = b"<main>" + b"<p>Some <b>text</b> here.</p>" * (3 * MAX_DEPTH) + b"</main>"
    assert isinstance(payload_text(spans, "text/html"), Extracted)


def test_utf_8_that_is_cut_inside_a_character_is_still_utf_8() -> None:
    payload = (WORDS * 3 + "ü").encode()[:-1]
    assert decode(payload, "text/html") == WORDS * 3 + "\N{REPLACEMENT CHARACTER}"
    assert decode(payload, "text/html; charset=latin-1").startswith(WORDS)
    short = "caf\xe9".encode("latin-1")  # one byte beyond ASCII at the end proves nothing
    assert decode(short, "text/html; charset=latin-1") == "café"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_decide(encoding: str) -> None:
    assert decode(WORDS.encode(encoding), "text/html; charset=latin-1") == WORDS
    assert has_mark(WORDS.encode(encoding))
    assert not has_mark(WORDS.encode())


def test_pages_with_too_many_tags_are_dropped_before_they_are_parsed() -> None:
    page = b"<p>" * 11
    assert payload_text(page + b"text", "text/html", max_tags=10) == Dropped(
        "extract.too_many_tags"
    )
    assert isinstance(payload_text(page + b"text", "text/html", max_tags=11), Extracted)


def metadata_of(head: str, url: str = "https://example.org/a/b.html?x=1") -> dict[str, str]:
    page = f"<html><head>{head}</head><body><main><p>Some text here.</p></main></body></html>"
    extracted = payload_text(page.encode(), "text/html; charset=utf-8", url)
    assert isinstance(extracted, Extracted)
    return extracted.metadata


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("", {}),
        ("<title>\n A  title &amp;\tmore </title>", {"title": "A title & more"}),
        ("<title> </title><meta property='og:title' content='Other'>", {"title": "Other"}),
        ("<link rel=canonical href='/c'>", {"canonical_url": "https://example.org/c"}),
        ("<link rel='Nofollow Canonical' href='d'>", {"canonical_url": "https://example.org/a/d"}),
        ("<meta property='og:url' content='http://e.org/'>", {"canonical_url": "http://e.org/"}),
        ("<link rel=canonical href='javascript:x()'>", {}),
        ("<link rel=canonical href='http://[bad'>", {}),
        ("<link rel=alternate href='/c'>", {}),
        ("<meta name=date content='2024-5-1'>", {"date": "2024-05-01"}),
        (
            "<meta property='article:published_time' content='2024-05-01T10:00:00+02:00'>"
            "<meta name=date content='2020-01-01'>",
            {"date": "2024-05-01"},
        ),
        ("<meta itemprop=datePublished content='20240501'>", {"date": "2024-05-01"}),
        ("<meta name=date content='soon'>", {}),
        (
            '<script type="application/ld+json">{"datePublished" : "2023-12-31T00:00"}</script>',
            {"date": "2023-12-31"},
        ),
    ],
)
def test_what_a_page_says_about_itself(head: str, expected: dict[str, str]) -> None:
    assert metadata_of(head) == expected


def test_metadata_is_bounded_and_can_be_stored() -> None:
    found = metadata_of(f"<title>{'long ' * 1000}</title><meta name=x content='&#xD800;'>")
    assert len(found["title"]) <= 1000
    assert found["title"].encode()


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2024-02-29", "2024-02-29"), ("2023-02-29", ""), ("2024/1/2 10:00", "2024-01-02"),
        ("20240102", "2024-01-02"), ("202401021", ""), ("Tue, 02 Jan 2024 10:00:00 GMT",
        "2024-01-02"), ("0001-01-01", ""), ("9999-99-99", ""), ("", ""), ("12", ""),
    ],
)  # fmt: skip
def test_dates_are_read_in_three_forms(text: str, day: str) -> None:
    assert parse_date(text) == day
