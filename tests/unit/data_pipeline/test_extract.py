"""Text of payloads: what resiliparse makes of blocks, encodings, and what has no text."""

import codecs
import json

import pytest

from data_pipeline.extract import (
    EXTRACTOR,
    MAX_DEPTH,
    NO_EXTRACTOR,
    Extracted,
    decode,
    html_to_text,
    media_kind,
    payload_text,
)
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


def test_blocks_come_out_as_lines_without_what_surrounds_the_content() -> None:
    text = html_to_text(PAGE.encode(), "text/html; charset=utf-8")
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
    surrogate = html_to_text(b"<p>a&#xD800;b&#0;c\x00d</p>", "text/html")
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
