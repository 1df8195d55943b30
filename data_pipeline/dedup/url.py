"""URL keys: two pages with the same key are one page crawled twice.

C4 keeps the page with the newest timestamp per key, the first on a tie; its validation split is
drawn from the md5 of the same key. A key is not an address: it has lost its scheme.

    normalize_c4("https://www.example.org/a/?utm_source=x")  # example.org/a
"""

import hashlib
import re

_SCHEME = re.compile(r"https?:\/\/(www\.)?")
_TRACKING = re.compile(r"\?(utm_|ref|feed).*")


def normalize_c4(url: str) -> str:
    """Return the key under which C4 regards two addresses as one.

    Every ``http://``, ``https://`` and a ``www.`` after it goes, wherever it stands; then what
    follows ``?utm_``, ``?ref`` or ``?feed``; then slashes at the end. Case is kept.
    """
    return _TRACKING.sub("", _SCHEME.sub("", url)).rstrip("/")


def url_digest(normalized_url: str) -> str:
    """Return the md5 of a key in hex: its rank in line deduplication and in the split."""
    return hashlib.md5(normalized_url.encode("utf-8"), usedforsecurity=False).hexdigest()
