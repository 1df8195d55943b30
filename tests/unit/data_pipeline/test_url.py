"""C4's URL key, as its regular expressions have it."""

import hashlib

import pytest

from data_pipeline.dedup.url import normalize_c4, url_digest


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("http://example.org/a", "example.org/a"),
        ("https://www.example.org/a/", "example.org/a"),
        ("https://www.example.org///", "example.org"),
        ("HTTP://example.org", "HTTP://example.org"),
        ("www.example.org", "www.example.org"),
        ("https://web.org/https://www.example.org/", "web.org/example.org"),
        ("http://http://a.org", "a.org"),
        ("https://a.org/p?utm_source=x&id=3", "a.org/p"),
        ("https://a.org/p?reference=x", "a.org/p"),
        ("https://a.org/p/?feed=rss", "a.org/p"),
        ("https://a.org/p?id=3&utm_source=x", "a.org/p?id=3&utm_source=x"),
        ("https://a.org/p?id=3/", "a.org/p?id=3"),
        ("https://a.org/Path", "a.org/Path"),
        ("", ""),
    ],
)
def test_key(url: str, key: str) -> None:
    assert normalize_c4(url) == key


def test_digest_is_the_md5_of_the_key() -> None:
    assert url_digest("a.org") == hashlib.md5(b"a.org").hexdigest()
