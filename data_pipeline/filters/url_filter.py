"""Block lists for addresses: by domain, by address, by word, as FineWeb's URL filter has them.

The rules are those of datatrove's filter (arXiv:2406.17557, section 3.2) with two differences: a
listed domain blocks everything below it, and words are compared in lower case. A document without
an address passes. Domains end where the public suffix list inside tldextract says.

    UrlFilter(domains=files)(document)  # Dropped("url_filter.domain")
"""

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tldextract import TLDExtract

from data_pipeline.config.content import UrlFilterConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.dedup.url import normalize_c4
from data_pipeline.document import Document
from data_pipeline.filters.block_lists import HashedSet, ListFile, entries, list_files
from data_pipeline.step import Dropped, Finding, Kept, StepKind, Verdict

_PORT = re.compile(r":[0-9]*$")
_SEPARATORS = re.compile(r"[^a-z0-9]+")
_BUNDLED = Path(__file__).parent / "url_lists"


class _Match(NamedTuple):
    """What a rule found in an address."""

    rule: str
    """Rule, without the stage."""
    found: str
    """Entries of the list that were found, empty for none."""
    limit: str
    """What the rule asks for."""
    passed: bool
    """Whether the address meets it."""


def _files(config: UrlFilterConfig) -> dict[str, tuple[ListFile, ...]]:
    """Return the files of every list, the bundled one first; the key is the name of the list."""
    lists = {
        "domains": config.domains, "urls": config.urls, "words": config.words,
        "soft_words": config.soft_words, "subwords": config.subwords,
    }  # fmt: skip
    files = {}
    for kind, paths in lists.items():
        bundled = _BUNDLED / f"{kind}.txt"
        own = (str(bundled),) if config.bundled and bundled.is_file() else ()
        files[kind] = list_files((*own, *paths), kind)
    return files


@dataclass(frozen=True, slots=True)
class _Subwords:
    """Finds the first of some words in a string, by their first letters."""

    width: int
    heads: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, words: set[str]) -> "_Subwords":
        width = min(map(len, words), default=1)
        heads: dict[str, tuple[str, ...]] = {}
        for word in sorted(words):
            heads[word[:width]] = (*heads.get(word[:width], ()), word)
        return cls(width, heads)

    def find(self, text: str) -> str:
        """Return a word that stands in the text, or nothing."""
        if not self.heads:
            return ""
        width = self.width
        for start in range(len(text) - width + 1):
            for word in self.heads.get(text[start : start + width], ()):
                if text.startswith(word, start):
                    return word
        return ""


@functools.cache
def _suffixes() -> TLDExtract:
    """Load the public suffix list that comes with tldextract."""
    return TLDExtract(suffix_list_urls=(), cache_dir=None)


def host_of(url: str) -> str:
    """Return the host of an address in lower case, without user, port and final dots."""
    host = url.partition("//")[2] or url
    for mark in "/?#":
        host = host.partition(mark)[0]
    host = host.rpartition("@")[2]
    port = _PORT.search(host)
    return (host[: port.start()] if port else host).rstrip(".").lower()


def registered_domain(host: str) -> str:
    """Return the domain that somebody has registered: the public suffix and one label; or an IP."""
    parts = _suffixes()(host)
    return ".".join(part for part in (parts.domain, parts.suffix) if part).lower()


def _word(line: str) -> str:
    return _SEPARATORS.sub("", line.lower())


class UrlFilter:
    """Drops documents whose address is blocked."""

    name = "url_filter"

    def __init__(
        self,
        *,
        domains: tuple[ListFile, ...] = (),
        urls: tuple[ListFile, ...] = (),
        words: tuple[ListFile, ...] = (),
        soft_words: tuple[ListFile, ...] = (),
        subwords: tuple[ListFile, ...] = (),
        soft_threshold: int = 2,
    ) -> None:
        """Load the lists.

        Raises:
            DataError: a list cannot be read or has changed since the run began.
        """
        self._domains = HashedSet.of_domains(domains)
        self._urls = HashedSet.of(entries(urls, lambda line: normalize_c4(line.strip())))
        self._words = frozenset(entries(words, _word))
        self._soft_words = frozenset(entries(soft_words, _word))
        self._subwords = _Subwords.of(set(entries(subwords, _word)))
        self._soft_threshold = soft_threshold
        self._limit = f"fewer than {soft_threshold} soft words"

    def __call__(self, document: Document) -> Verdict:
        """Drop the document at the first rule that its address breaks."""
        if document.url:
            for match in self._matches(document.url):
                if not match.passed:
                    return Dropped(f"url_filter.{match.rule}")
        return Kept(document)

    def findings(self, document: Document) -> list[Finding]:
        """Return what each list says of the document's address."""
        return [
            Finding(f"url_filter.{match.rule}", match.found, match.limit, match.passed)
            for match in (self._matches(document.url) if document.url else ())
        ]

    def _listed_domain(self, host: str) -> str:
        """Return the listed domain at or above a host, if it is no mere public suffix."""
        for domain in self._domains.domains_above(host):
            if len(domain) >= len(registered_domain(host)):
                return domain
        return ""

    def _matches(self, url: str) -> Iterator[_Match]:
        """Yield what each rule finds, cheap to leave once one has found something."""
        domain = self._listed_domain(host_of(url))
        yield _Match("domain", domain, "no listed domain", not domain)
        listed = url if len(self._urls) and normalize_c4(url) in self._urls else ""
        yield _Match("url", listed, "no listed address", not listed)
        lowered = url.lower()
        parts = frozenset(_SEPARATORS.split(lowered))
        hard, soft = sorted(parts & self._words), sorted(parts & self._soft_words)
        yield _Match("word", " ".join(hard), "no listed word", not hard)
        yield _Match("soft_words", " ".join(soft), self._limit, len(soft) < self._soft_threshold)
        subword = self._subwords.find(_SEPARATORS.sub("", lowered))
        yield _Match("subword", subword, "no listed word anywhere", not subword)


def _options(config: PipelineConfig) -> dict[str, Any]:
    section = config.url_filter
    return {**_files(section), "soft_threshold": section.soft_threshold}


def _settings(config: PipelineConfig) -> dict[str, Any]:
    section = config.url_filter
    lists = {kind: [file.digest for file in files] for kind, files in _files(section).items()}
    version = importlib.metadata.version("tldextract")
    return {**lists, "soft_threshold": section.soft_threshold, "tldextract": version}


URL_FILTER = StepKind(build=UrlFilter, options=_options, settings=_settings)
"""How the step comes out of the configuration."""
