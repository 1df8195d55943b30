"""Block lists: what is blocked, by which rule, and how lists are read."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_pipeline.config.content import UrlFilterConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.block_lists import HashedSet, ListFile, domain_entry, entries, list_files
from data_pipeline.filters.url_filter import URL_FILTER, UrlFilter, host_of, registered_domain
from data_pipeline.step import Dropped, Kept, Step
from llmtrain.errors import ConfigError, DataError


def page(url: str) -> Document:
    return Document(id="0", source="s", text="text", url=url)


def built(section: UrlFilterConfig) -> Step:
    options = URL_FILTER.options(PipelineConfig(stages=(), url_filter=section))
    assert options is not None
    assert hash(tuple(options.items()))
    return URL_FILTER.build(**options)


@pytest.fixture
def lists(tmp_path: Path) -> UrlFilterConfig:
    """Lists of every kind, in the layouts they come in."""
    (tmp_path / "adult").mkdir()
    (tmp_path / "adult" / "domains").write_text(
        "# a comment\nBad.example\nblog.host.co.uk\n1.2.3.4\n"
    )
    (tmp_path / "adult" / "domains.gz").write_bytes(
        gzip.compress(b"0.0.0.0 hosts.example # why\n127.0.0.1 localhost\n*.wild.example\n")
    )
    (tmp_path / "adult" / "urls").write_text("good.example/bad/page\n")
    for name, words in (
        ("hard", "Evil-Word\n"),
        ("soft", "one\ntwo\nthree\n"),
        ("sub", "abcdef\nabcxyz"),
    ):
        (tmp_path / name).write_text(words)
    return UrlFilterConfig(
        bundled=False, domains=(str(tmp_path / "adult"),), urls=(str(tmp_path / "adult"),),
        words=(str(tmp_path / "hard"),), soft_words=(str(tmp_path / "soft"),),
        subwords=(str(tmp_path / "sub"),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("https://bad.example/x", "domain"),
        ("http://WWW.a.Bad.Example:8080?q", "domain"),
        ("https://notbad.example/x", None),
        ("https://bad.example.org/", None),
        ("https://x.blog.host.co.uk/", "domain"),
        ("https://other.host.co.uk/", None),
        ("http://1.2.3.4/x", "domain"),
        ("http://sub.hosts.example", "domain"),
        ("http://wild.example/", "domain"),
        ("https://www.good.example/bad/page/", "url"),
        ("https://good.example/bad/page2", None),
        ("https://good.example/EvilWord/1", "word"),
        ("https://good.example/evilwords", None),
        ("https://good.example/one-of", None),
        ("https://good.example/one-one", None),
        ("https://good.example/Three_one", "soft_words"),
        ("https://good.example/a/b/c-def", "subword"),
        ("https://good.example/?x=zabcxyzz", "subword"),
        ("https://good.example/abcdxyz", None),
        ("", None),
        ("no address at all", None),
    ],
)
def test_rules(lists: UrlFilterConfig, url: str, rule: str | None) -> None:
    step = built(lists)
    verdict = step(page(url))
    assert verdict == (Kept(page(url)) if rule is None else Dropped(f"url_filter.{rule}"))
    failed = [finding.rule for finding in step.findings(page(url)) if not finding.passed]
    assert failed == ([] if rule is None else [f"url_filter.{rule}"])


def test_all_rules_are_reported_of_an_address_that_breaks_many(lists: UrlFilterConfig) -> None:
    findings = built(lists).findings(page("http://bad.example/one/two/abc-def"))
    assert [(f.rule.partition(".")[2], f.value) for f in findings if not f.passed] == [
        ("domain", "bad.example"), ("soft_words", "one two"), ("subword", "abcdef"),
    ]  # fmt: skip


def test_the_number_of_soft_words_is_a_setting(lists: UrlFilterConfig) -> None:
    files = list_files(lists.soft_words, "soft_words")
    url = page("https://good.example/one/two")
    assert UrlFilter(soft_words=files, soft_threshold=3)(url) == Kept(url)
    with pytest.raises(ConfigError, match="soft_threshold=0"):
        UrlFilterConfig(soft_threshold=0)


@pytest.mark.parametrize(
    ("url", "host", "registered"),
    [
        ("https://a.B.example.co.uk:80/x?y//z", "a.b.example.co.uk", "example.co.uk"),
        ("http://user:pass@10.0.0.1/", "10.0.0.1", "10.0.0.1"),
        ("//münchen.de.#x", "münchen.de", "münchen.de"),
        ("x.blogspot.com", "x.blogspot.com", "blogspot.com"),
        ("http://[::1]:8/x", "[::1]", "[::1]"),
    ],
)
def test_hosts_and_registered_domains(url: str, host: str, registered: str) -> None:
    assert host_of(url) == host
    assert registered_domain(host) == registered


def test_a_listed_public_suffix_blocks_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("co.uk\nmine.co.uk\n")
    step = UrlFilter(domains=list_files([str(tmp_path / "list")], "domains"))
    assert step(page("http://www.mine.co.uk/")) == Dropped("url_filter.domain")
    assert isinstance(step(page("http://yours.co.uk/")), Kept)


def test_the_bundled_lists_block_their_kind_and_no_docs() -> None:
    step = built(UrlFilterConfig())
    assert step(page("https://m.pornhub.com/")) == Dropped("url_filter.domain")
    for url in (
        "https://docs.python.org/3/",
        "https://essex.gov.uk/middlesex",
        "https://a.org/sex",
    ):
        assert isinstance(step(page(url)), Kept)


def test_lists_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list_files([str(tmp_path / "absent")], "domains")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file domains"):
        list_files([str(tmp_path / "empty")], "domains")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"a.example\n" * 99)[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        list(entries(list_files([str(tmp_path / "cut.gz")], "domains")))
    (tmp_path / "list").write_text("a.example")
    files = list_files([str(tmp_path / "list")], "domains")
    (tmp_path / "list").write_text("b.example")
    with pytest.raises(DataError, match="has changed since the run began"):
        list(entries(files))


def test_lists_are_read_from_every_frame_of_zstd_and_refused_where_one_is_damaged(
    tmp_path: Path,
) -> None:
    frames = [zstandard.compress(f"{name}.example\n".encode() * 9) for name in "ab"]
    path = tmp_path / "list.zst"
    path.write_bytes(b"".join(frames))
    files = list_files([str(path)], "domains")
    assert set(entries(files)) == {"a.example", "b.example"}
    assert len(HashedSet.of_domains(files)) == 2
    for damaged in (frames[0] + frames[1][:-3], frames[0] + b"none" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"list\.zst cannot be read \(.+\)"):
            list(entries(list_files([str(path)], "domains")))


def test_the_manifest_names_every_list(lists: UrlFilterConfig, tmp_path: Path) -> None:
    config = PipelineConfig(stages=(), url_filter=lists)
    before = URL_FILTER.settings(config)
    assert len(before["domains"]) == 2
    (tmp_path / "hard").write_text("other")
    assert URL_FILTER.settings(config) != before


def test_a_set_of_hashes_is_a_set() -> None:
    words = [f"host{i}.example" for i in range(70_000)]
    found = HashedSet.of([*words, *words[:10]])
    assert len(found) == 70_000
    assert all(word in found for word in words[::1000])
    assert not any(f"{word}x" in found for word in words[::1000])
    assert "x" not in HashedSet.of([])


def test_plain_and_odd_lines_make_one_set(tmp_path: Path) -> None:
    """Plain lines are hashed in one pass over the bytes, the others one by one."""
    lines = [f"Host-{i}.example" for i in range(60_000)]
    odd = [f"0.0.0.0 odd{i}.example # why" for i in range(500)] + [
        "bücher.example\r",
        ".dot.example.",
    ]
    text = "\n".join(["bom.example", *lines, "", "# none", *odd, "last.example"])
    (tmp_path / "plain").write_text(text, encoding="utf-8-sig")
    found = HashedSet.of_domains(list_files([str(tmp_path / "plain")], "domains"))
    assert len(text) > 1 << 20  # more than one chunk
    domains = [domain for line in text.split("\n") if (domain := domain_entry(line))]
    assert np.array_equal(found.hashes, HashedSet.of(domains).hashes)
    assert list(found.domains_above("a.HOST-7.example")) == ["HOST-7.example"]
    assert list(found.domains_above("bücher.example")) == ["bücher.example"]


def test_entries_of_hosts_files() -> None:
    lines = ["", "# x", "0.0.0.0  A.b ", "a.b", "*.a.b", ".a.b.", "::1 a.b"]
    assert [domain_entry(line) for line in lines] == ["", "", *["a.b"] * 5]
    assert ListFile("a", "b") == ("a", "b")
