"""The validation split: by cluster, or as C4 does."""

import hashlib

from data_pipeline.tokens.split import held_out_by_cluster, held_out_by_url


def test_share_of_clusters_is_held_out() -> None:
    held = sum(held_out_by_cluster(f"{i:032x}", 0.1) for i in range(5000))
    assert abs(held - 500) < 70
    assert not any(held_out_by_cluster(f"{i:032x}", 0.0) for i in range(100))


def test_larger_share_holds_out_more_of_the_same() -> None:
    small = {i for i in range(1000) if held_out_by_cluster(str(i), 0.02)}
    large = {i for i in range(1000) if held_out_by_cluster(str(i), 0.2)}
    assert small < large


def test_url_rule_is_the_thousandth_of_c4() -> None:
    urls = [f"https://www.example.org/{i}/" for i in range(4000)]
    held = {url for url in urls if held_out_by_url(url, 0.001)}
    expected = {
        url for i, url in enumerate(urls)
        if int(hashlib.md5(f"example.org/{i}".encode()).hexdigest(), 16) % 1000 == 0
    }  # fmt: skip
    assert held == expected
    assert held
