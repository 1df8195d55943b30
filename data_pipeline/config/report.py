"""Settings of the commands that describe a pipeline: its report, one document, an estimate."""

from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.config.checks import check_positive
from data_pipeline.config.run import PipelineConfig, check_pipeline
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """``llmtrain-data report``: one HTML page and ``data_card.json`` of a pipeline's folder."""

    out: str
    """Folder that ``llmtrain-data run`` wrote."""
    html: str | None = None
    """File of the page; null means report.html in that folder."""
    samples: int = 3
    """Documents shown for every reason to drop some."""
    read_bytes: int = 2_000_000_000
    """Bytes of text read for each histogram; of a larger corpus, shards chosen by a hash are
    read, and the page says so."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(samples=self.samples, read_bytes=self.read_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainConfig:
    """``llmtrain-data explain``: what happened to one document, and what every rule measured."""

    out: str
    """Folder that ``llmtrain-data run`` wrote."""
    url: str | None = None
    """Address of the document."""
    doc: str | None = None
    """Id of the document, 32 hex digits, or their beginning."""
    html: str | None = None
    """File for the same as an HTML page; null prints it only."""

    def __post_init__(self) -> None:
        """Refuse what names no document, or two."""
        if (self.url is None) == (self.doc is None):
            raise ConfigError("explain needs one document: give url=ADDRESS or doc=ID, one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """``llmtrain-data estimate``: the funnel, time and disk of the whole from a sample of it."""

    input: Mapping[str, str | tuple[str, ...]]
    """Source name -> path, glob, folder or hf:NAME, or a list of them."""
    pipeline: PipelineConfig
    """What would be done."""
    num_workers: int = 1
    """Worker processes, of the sample and of the whole."""
    time_limit_s: float = 3600.0
    """Seconds one attempt at one task may take."""
    sample_bytes: int = 64_000_000
    """Bytes of raw records in the sample, as they lie in the files."""
    read_bytes: int = 1_000_000_000
    """Bytes of raw files the sample is drawn from; of a larger input, files chosen by a hash."""
    out: str | None = None
    """File for the estimate as JSON; null prints it only."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(
            num_workers=self.num_workers, time_limit_s=self.time_limit_s,
            sample_bytes=self.sample_bytes, read_bytes=self.read_bytes,
        )  # fmt: skip
        check_pipeline(self.pipeline)
