"""What a page says about itself: title, date of publication, canonical address.

Only what stands in the page and is well-formed is taken, and nothing is asked of the clock, so the
same page gives the same values on every day.

    page_metadata(tree, html, "https://example.org/a")   # {"title": "...", "date": "2024-05-01"}
"""

import re
from datetime import date
from email.utils import parsedate
from typing import Any
from urllib.parse import urljoin, urlsplit

MAX_CHARACTERS = 1000
"""Longest title or address that is kept."""
_TITLES = (
    'meta[property="og:title" i]', 'meta[name="twitter:title" i]', 'meta[name="dc.title" i]',
    'meta[name="citation_title" i]',
)  # fmt: skip
_DATES = (
    "article:published_time", "og:article:published_time", "datepublished", "date",
    "dc.date", "dc.date.issued", "dcterms.issued", "dcterms.date", "dcterms.created",
    "citation_publication_date", "citation_date", "publication_date", "publish-date",
    "publishdate", "pubdate", "parsely-pub-date", "sailthru.date", "article.published",
    "article:modified_time", "og:updated_time", "last-modified",
)  # fmt: skip
"""Names under which pages give their date, those of publication first."""
_NAMED = ("property", "name", "itemprop", "http-equiv")
_LIKE_DATES = ",".join(
    f'meta[{attribute}*="{part}" i]'
    for attribute, parts in (
        ("name", ("date", "time", "issued", "created", "publish", "modified")),
        ("property", ("date", "time")),
        ("itemprop", ("date",)),
        ("http-equiv", ("modified",)),
    )
    for part in parts
)
"""Selects the few elements that may hold a date: listing all of a head takes longer than parsing
it."""
_JSON_DATE = re.compile(r'"datePublished"\s*:\s*"([^"\\]{4,40})"')
_ISO_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
_COMPACT_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})(?!\d)")
_FIRST_YEAR = 1980


def page_metadata(tree: Any, html: str, url: str) -> dict[str, str]:
    """Return those of ``title``, ``date`` (YYYY-MM-DD) and ``canonical_url`` that a page gives.

    ``tree`` is the parsed page and ``html`` its source; addresses are told from ``url``.
    """
    head = tree.head
    if head is None:
        return {}
    found = {
        "title": _clean(tree.title or "") or _first_title(head),
        "date": _date(head, html),
        "canonical_url": _address(_canonical(head), url),
    }
    return {name: value for name, value in found.items() if value}


def _content(head: Any, selector: str, attribute: str = "content") -> str:
    element = head.query_selector(selector)
    return (element.getattr(attribute) or "") if element is not None else ""


def _first_title(head: Any) -> str:
    """Return a title that stands in a ``<meta>``, or an empty string."""
    titles = (_content(head, selector) for selector in _TITLES)
    return next((title for text in titles if (title := _clean(text))), "")


def _canonical(head: Any) -> str:
    given = _content(head, 'link[rel~="canonical" i]', "href")
    return given or _content(head, 'meta[property="og:url" i]')


def _clean(text: str) -> str:
    """Return text on one line, without what UTF-8 or a table cannot hold, cut to length."""
    line = " ".join(text.replace("\0", " ").split())
    return line[:MAX_CHARACTERS].strip().encode("utf-8", "replace").decode()


def _date(head: Any, html: str) -> str:
    """Return the date of publication as YYYY-MM-DD, or an empty string."""
    if head.query_selector(_LIKE_DATES) is not None:
        named: dict[str, str] = {}
        for element in head.query_selector_all(_LIKE_DATES):
            content = element.getattr("content") or ""
            for attribute in _NAMED:
                named.setdefault((element.getattr(attribute) or "").lower(), content)
        for name in _DATES:
            if name in named and (found := parse_date(named[name])):
                return found
    if "datePublished" in html:
        for match in _JSON_DATE.finditer(html):
            if found := parse_date(match[1]):
                return found
    return ""


def parse_date(text: str) -> str:
    """Return the day that an ISO-8601, compact or RFC-2822 date begins with, or nothing."""
    text = text.strip()[:60]
    match = _ISO_DATE.match(text) or _COMPACT_DATE.match(text)
    try:
        if match is not None:
            day = date(int(match[1]), int(match[2]), int(match[3]))
        elif (parts := parsedate(text)) is not None:
            day = date(*parts[:3])
        else:
            return ""
    except (ValueError, TypeError, IndexError, OverflowError):
        return ""
    return day.isoformat() if day.year >= _FIRST_YEAR else ""


def _address(given: str, url: str) -> str:
    """Return an address as http(s), told from the page's own, or an empty string."""
    given = given.strip()
    if not given or len(given) > MAX_CHARACTERS:
        return ""
    try:
        full = urljoin(url, given)
        parts = urlsplit(full)
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not parts.netloc or any(c.isspace() for c in full):
        return ""
    return full.encode("utf-8", "replace").decode()
