"""Settings of reading and extraction: from raw files to documents."""

from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.config.checks import check_positive, check_unread

ExtractorName = Literal["resiliparse", "trafilatura", "union"]
"""What makes text of HTML."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafilaturaConfig:
    """How trafilatura is used; it runs in a process of its own."""

    favor: Literal["balanced", "precision", "recall"] = "balanced"
    """Whether text in doubt is left out (``precision``) or taken in (``recall``)."""
    tables: bool = True
    """Keep the text of tables."""
    limit_s: float = 10.0
    """Seconds of processor time one page may take; then the process is killed and the page is
    dropped as ``extract.timed_out``."""

    def __post_init__(self) -> None:
        """Refuse limits that are none."""
        check_positive(limit_s=self.limit_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """From raw files to documents."""

    extractor: ExtractorName = "resiliparse"
    """What makes text of HTML: ``resiliparse``, ``trafilatura`` or ``union``, the lines of both."""
    trafilatura: TrafilaturaConfig = field(default_factory=TrafilaturaConfig)
    """Options of trafilatura; refused with resiliparse alone, which reads none of them."""
    max_characters: int = 190_000
    """Longest text that is kept, in characters; C4 drops longer pages before anything else."""
    max_record_bytes: int = 8 << 20
    """Longest record, line or file that is read, in uncompressed bytes; longer ones are
    quarantined (rows of Parquet and Hugging Face datasets are bounded by ``max_characters`` alone).
    A task holds one record in memory, some three times over while it is read."""
    max_tags: int = 100_000
    """Most ``<`` in a page; one with more is dropped as ``extract.too_many_tags`` before it is
    parsed, which takes about 400 bytes for each."""
    shard_bytes: int = 64_000_000
    """Bytes of text in one document shard; a shard is the unit of work and of retry."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(
            max_characters=self.max_characters, shard_bytes=self.shard_bytes,
            max_record_bytes=self.max_record_bytes, max_tags=self.max_tags,
        )  # fmt: skip
        if self.extractor == "resiliparse":
            check_unread(self, "trafilatura", "extractor=trafilatura or union")


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldsConfig:
    """Names of the fields in JSONL, Parquet and Hugging Face rows."""

    text: str = "text"
    """Field with the text."""
    id: str | None = None
    """Field with a stable, unique id; null numbers the rows of each file."""
    url: str = "url"
    """Field with the address; rows without it have none, but a field named here has to be in the
    first row."""
    timestamp: str = "timestamp"
    """Field with the ISO-8601 time; as for the address, rows without it have none."""
    metadata: tuple[str, ...] = ()
    """Further fields to keep, as strings, in the documents' ``metadata``; each has to be in the
    first row."""
