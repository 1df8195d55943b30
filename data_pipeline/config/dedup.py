"""Settings of deduplication."""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.config.checks import check_positive
from llmtrain.errors import ConfigError

Folders = str | tuple[str, ...] | None
"""One folder, several, or none."""
SUBSTRING_MEMORY = 32
"""Bytes of memory that a byte of a block takes while repeated substrings are looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UrlDedupConfig:
    """Of pages with the same address the newest stays."""

    against: Folders = None
    """Output folders of earlier runs; pages they hold already go."""
    keep_keys: bool = False
    """Keep the keys (16 bytes a page) for later runs that name this one in ``against``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExactConfig:
    """Of documents with the same text the one with the smallest id stays."""

    against: Folders = None
    """Output folders of earlier runs; texts they hold already go."""
    keep_keys: bool = False
    """Keep the keys (16 bytes a text) for later runs that name this one in ``against``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanConfig:
    """Spans of consecutive sentences that stand elsewhere already go (arXiv:1910.10683)."""

    sentences: int = 3
    """Sentences in a span."""
    min_sentences: int = 3
    """Smallest number of sentences a document may have left after it has lost some."""

    def __post_init__(self) -> None:
        """Refuse spans that are none."""
        check_positive(sentences=self.sentences)
        if self.min_sentences < 0:
            raise ConfigError(f"min_sentences={self.min_sentences}; use 0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParagraphConfig:
    """Paragraphs that mostly consist of n-grams seen before go, by Bloom filter."""

    ngram: int = 13
    """Words in an n-gram; a paragraph with fewer words stays."""
    share: float = 0.8
    """Share of a paragraph's n-grams, in (0, 1], from which on it goes."""
    false_positive_rate: float = 1e-3
    """Chance in (0, 0.1] that the filter takes a new n-gram for one seen before."""

    def __post_init__(self) -> None:
        """Refuse shares and rates that are none."""
        check_positive(ngram=self.ngram)
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"share={self.share}; use a number in (0, 1]")
        if not 0.0 < self.false_positive_rate <= 0.1:
            raise ConfigError(f"false_positive_rate={self.false_positive_rate}; use (0, 0.1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubstringConfig:
    """Stretches of text that stand earlier in the same block go, by suffix array."""

    unit: Literal["bytes", "tokens"] = "bytes"
    """What is counted: UTF-8 bytes, or words, single characters of scripts without spaces, and
    punctuation marks."""
    min_length: int | None = None
    """Shortest stretch that goes, in units; null means 100 bytes or 50 tokens."""
    block_bytes: int | None = None
    """Bytes of consecutive text that are searched together; null means a 64th of memory_gib, half
    of what it could hold. Repeats across blocks are not found."""

    def __post_init__(self) -> None:
        """Refuse lengths that are none."""
        if self.min_length is not None:
            check_positive(min_length=self.min_length)
        if self.block_bytes is not None:
            check_positive(block_bytes=self.block_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class MinHashConfig:
    """Near-duplicate detection."""

    preset: Literal["fineweb", "slimpajama", "redpajama_v2", "olmo"] = "fineweb"
    """Shingles, bands and rows of a published corpus."""
    keep: Literal["longest", "newest", "quality"] = "longest"
    """Which document of a cluster stays: the longest, the one with the newest timestamp, or the
    one with the highest score of the quality stage; the longest, then the smallest id, on a tie."""
    jaccard_threshold: float | None = None
    """Smallest true Jaccard similarity of shingles, in (0, 1], at which two documents that share a
    band are joined; null joins all that share a band, as the published corpora did."""
    against: Folders = None
    """Output folders of earlier runs with the same preset that kept their keys; clusters that
    share a band with a document of theirs go."""
    keep_keys: bool = False
    """Keep the band keys (8 bytes a band and document) for later runs that name this one in
    ``against``."""

    def __post_init__(self) -> None:
        """Refuse thresholds that are none, and a check that old documents cannot take part in."""
        if self.jaccard_threshold is None:
            return
        if not 0.0 < self.jaccard_threshold <= 1.0:
            raise ConfigError(f"jaccard_threshold={self.jaccard_threshold}; use (0, 1] or null")
        if self.against is not None:
            raise ConfigError(
                f"jaccard_threshold={self.jaccard_threshold} needs the texts of both documents, "
                "but of the corpora in against= only band keys are kept; use jaccard_threshold=null"
            )
