"""C4's URL key, as its regular expressions have it."""

import hashlib

import pytest

from data_pipeline.url import in_validation, normalize_c4, url_digest


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


def test_one_page_in_a_thousand_is_held_out_by_the_md5_of_its_key() -> None:
    keys = [f"example.org/{i}" for i in range(5000)]
    held_out = [key for key in keys if in_validation(key)]
    assert held_out == [
        key for key in keys if int(hashlib.md5(key.encode()).hexdigest(), 16) % 1000 == 0
    ]
    assert 0 < len(held_out) < 15
    assert all(in_validation(key, modulus=1) for key in keys)
    assert url_digest("a.org") == hashlib.md5(b"a.org").hexdigest()
