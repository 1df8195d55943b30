"""From a record's payload to plain text: decode, take the main content, one block per line.

The same payload and content type always give the same text: an ``Extractor`` names version and
options, so that a token can be traced to a record by extracting it again.

    payload_text(b"<p>Hello there.</p>", "text/html").text  # 'Hello there.'
"""

import importlib.metadata
import json
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from data_pipeline.document import Extractor
from data_pipeline.read.depth import exceeds_depth
from data_pipeline.read.encoding import HEAD_BYTES, decode
from data_pipeline.read.page_metadata import page_metadata
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
"""What makes text of HTML where nothing else is asked for."""
NO_EXTRACTOR = Extractor(name="none", version="")
"""Stands where the payload was text already."""

MAX_TAGS = 100_000
"""Most ``<`` in a page where no other limit is given; a parsed page takes 400 bytes for each."""
MAX_DEPTH = 1000
"""Elements open at once. The time of main-content extraction grows with the cube of the depth
(0.06 s at 1,000, 2.9 s at 6,000), so deeper pages are dropped."""

_HTML_TYPES = frozenset({"text/html", "application/xhtml+xml", "application/vnd.wap.xhtml+xml"})
_TEXT_TYPES = frozenset({"text/plain", "text/markdown", "text/x-rst"})
_UNSTATED_TYPES = frozenset({"", "application/octet-stream", "unknown/unknown"})
_HTML_START = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extracted:
    """The text of a payload and what made it."""

    text: str
    """The text, blocks on lines of their own."""
    extractor: Extractor
    """What made it."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the page says about itself: ``title``, ``date``, ``canonical_url``."""


class PageExtractor(Protocol):
    """Makes text of HTML."""

    extractor: Extractor
    """Name, version and options."""

    def text_of(self, html: str, tree: Any) -> str | Dropped:
        """Return the text of a page, given as source and parsed, or why it has none."""
        ...


class Resiliparse:
    """Main content by resiliparse: paragraphs, list items and table rows on lines.

    Line breaks and indentation inside ``<pre>`` stay; elsewhere white space is collapsed. Items
    carry a bullet or a number, cells are set apart by two tabs.
    """

    extractor = EXTRACTOR

    def text_of(self, html: str, tree: Any) -> str | Dropped:
        """Return the main content of a page."""
        text: str = extract_plain_text(tree, **_OPTIONS)
        return text


def payload_text(
    payload: bytes,
    content_type: str,
    url: str = "",
    extractor: PageExtractor | None = None,
    max_tags: int = MAX_TAGS,
) -> Extracted | Dropped:
    """Return the text of a record's payload, or the reason why it has none.

    Plain text (also the text of WET records) passes as it is; HTML goes through ``extractor``, by
    default resiliparse. Reasons: ``extract.not_text``, ``extract.too_many_tags``,
    ``extract.too_deep``, ``extract.empty``, and those of the extractor.
    """
    kind = media_kind(payload, content_type)
    if kind == "other":
        return Dropped("extract.not_text")
    text = decode(payload, content_type)
    if kind == "text":
        extracted = Extracted(text, NO_EXTRACTOR)
    else:
        made = _page_text(text, url, extractor or Resiliparse(), max_tags)
        if isinstance(made, Dropped):
            return made
        extracted = made
    return extracted if extracted.text.strip() else Dropped("extract.empty")


def _page_text(html: str, url: str, extractor: PageExtractor, max_tags: int) -> Extracted | Dropped:
    tags = html.count("<")
    if tags > max_tags:
        return Dropped("extract.too_many_tags")
    if tags > MAX_DEPTH and exceeds_depth(html, MAX_DEPTH):
        return Dropped("extract.too_deep")
    tree = HTMLTree.parse(html)
    metadata = page_metadata(tree, html, url)
    text = extractor.text_of(html, tree)
    if isinstance(text, Dropped):
        return text
    return Extracted(text, extractor.extractor, metadata)


def media_kind(payload: bytes, content_type: str) -> str:
    """Return ``html``, ``text`` or ``other``; a payload of unstated type is looked at."""
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in _HTML_TYPES:
        return "html"
    if media_type in _TEXT_TYPES:
        return "text"
    if media_type in _UNSTATED_TYPES and _HTML_START.search(payload, 0, HEAD_BYTES):
        return "html"
    return "other"
