"""From a record's payload to plain text: decode, take the main content, one block per line.

The same payload and content type always give the same text: ``EXTRACTOR`` names the version and
the options, so that a token can be traced to a record by extracting it again.

    payload_text(b"<p>Hello there.</p>", "text/html").text  # 'Hello there.'
"""

import codecs
import importlib.metadata
import json
import re
from dataclasses import dataclass
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5

from data_pipeline.document import Extractor
from data_pipeline.step import Dropped

_OPTIONS: dict[str, Any] = {
    "alt_texts": False,
    "comments": False,
    "form_fields": False,
    "links": False,
    "list_bullets": True,
    "main_content": True,
    "noscript": False,
    "preserve_formatting": True,
}

EXTRACTOR = Extractor(
    name="resiliparse",
    version=importlib.metadata.version("resiliparse"),
    options=json.dumps(_OPTIONS, sort_keys=True, separators=(",", ":")),
)
"""What makes text of HTML."""
NO_EXTRACTOR = Extractor(name="none", version="")
"""Stands where the payload was text already."""

MAX_DEPTH = 1000
"""Elements open at once. The time of main-content extraction grows with the cube of the depth
(0.06 s at 1,000, 2.9 s at 6,000), so deeper pages are dropped."""

_HTML_TYPES = frozenset({"text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml"})
_TEXT_TYPES = frozenset({"text/plain", "text/markdown", "text/x-rst"})
_UNSTATED_TYPES = frozenset({"", "application/octet-stream", "unknown/unknown"})
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<meta\b[^>]{0,300}?\bcharset\s*=\s*[\"']?([A-Za-z0-9_.:-]+)", re.IGNORECASE)
_XML = re.compile(rb"\s*<\?xml\b[^>]{0,200}?\bencoding\s*=\s*[\"']([A-Za-z0-9_.:-]+)")
_HTML_START = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HEAD_BYTES = 4096
_TAG = re.compile(rb"<(/?)([A-Za-z][A-Za-z0-9]*)")
_NEVER_DEEP = frozenset(
    b"area base br col embed hr img input link meta param source track wbr "
    b"p li dt dd option optgroup tr td th thead tbody tfoot colgroup caption rt rp".split()
)
"""Elements without content, and those that the next of their kind closes."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """The text of a payload and what made it."""

    text: str
    """The text, blocks on lines of their own."""
    extractor: Extractor
    """What made it."""


def payload_text(payload: bytes, content_type: str) -> Extracted | Dropped:
    """Return the text of a record's payload, or the reason why it has none.

    Plain text (also the text of WET records) passes as it is; HTML goes through
    ``html_to_text``. Reasons: ``extract.not_text``, ``extract.too_deep``, ``extract.empty``.
    """
    kind = media_kind(payload, content_type)
    if kind == "other":
        return Dropped("extract.not_text")
    if kind == "text":
        extracted = Extracted(decode(payload, content_type), NO_EXTRACTOR)
    elif _too_deep(payload):
        return Dropped("extract.too_deep")
    else:
        extracted = Extracted(html_to_text(payload, content_type), EXTRACTOR)
    return extracted if extracted.text.strip() else Dropped("extract.empty")


def html_to_text(payload: bytes, content_type: str) -> str:
    """Return the main content of a page: paragraphs, list items and table rows on lines.

    Line breaks and indentation inside ``<pre>`` stay; elsewhere white space is collapsed. Items
    carry a bullet or a number, cells are set apart by two tabs.
    """
    return extract_plain_text(decode(payload, content_type), **_OPTIONS)


def media_kind(payload: bytes, content_type: str) -> str:
    """Return ``html``, ``text`` or ``other``; a payload of unstated type is looked at."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in _HTML_TYPES:
        return "html"
    if media_type in _TEXT_TYPES:
        return "text"
    if media_type in _UNSTATED_TYPES and _HTML_START.search(payload, 0, _HEAD_BYTES):
        return "html"
    return "other"


def decode(payload: bytes, content_type: str) -> str:
    """Return the payload as a string; bytes that mean nothing in its encoding become U+FFFD.

    The first that holds decides: a byte order mark; that it is UTF-8 beyond ASCII, which other text
    practically never is by chance and declarations often get wrong; the charset of the content
    type; ``<meta>`` or XML declaration; detection.
    """
    for mark, unicode_form in _BOMS:
        if payload.startswith(mark):
            return payload[len(mark) :].decode(unicode_form, errors="replace")
    if not payload.isascii():
        try:
            return payload.decode("utf-8")
        except UnicodeDecodeError:
            pass
    encoding = _declared_encoding(payload, content_type) or detect_encoding(payload) or "utf-8"
    return payload.decode(encoding, errors="replace")


def _declared_encoding(payload: bytes, content_type: str) -> str | None:
    """Return the codec that header, ``<meta>`` or XML declaration names, if any is known."""
    labels = []
    if (header := _CHARSET.search(content_type)) is not None:
        labels.append(header[1])
    head = payload[:_HEAD_BYTES]
    for declaration in (_META.search(head), _XML.match(head)):
        if declaration is not None:
            labels.append(declaration[1].decode("ascii"))
    for label in labels:
        codec: str | None = map_encoding_to_html5(label, fallback_utf8=False)
        if codec is not None and (b"\0" in head or not codec.startswith("utf-16")):
            return codec
    return None


def _too_deep(payload: bytes) -> bool:
    """Whether more than ``MAX_DEPTH`` elements are open at once somewhere."""
    if payload.count(b"<") <= MAX_DEPTH:
        return False
    depth = 0
    for closing, tag in _TAG.findall(payload):
        if tag.lower() not in _NEVER_DEEP:
            depth = max(0, depth - 1) if closing else depth + 1
            if depth > MAX_DEPTH:
                return True
    return False
