"""Settings of ``llmtrain-data run``.

What is in ``PipelineConfig`` decides bytes; what stands beside it (workers, time limit) does not.

    config = load("data_run", ["pipeline=demo", "input.web=crawl", "out=corpus"], RunConfig)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.config.checks import check_positive, check_unread
from data_pipeline.config.content import (
    BadWordsConfig,
    DecontaminationConfig,
    PiiConfig,
    QualityConfig,
    UrlFilterConfig,
)
from data_pipeline.config.dedup import (
    SUBSTRING_MEMORY,
    ExactConfig,
    MinHashConfig,
    ParagraphConfig,
    SpanConfig,
    SubstringConfig,
    UrlDedupConfig,
)
from data_pipeline.config.execute import RayConfig, SlurmConfig
from data_pipeline.config.extract import ExtractConfig, FieldsConfig
from data_pipeline.config.rules import (
    C4Config,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LanguageConfig,
)
from data_pipeline.config.tokens import SplitConfig, StoreConfig, TokenizerTrainingConfig
from llmtrain.errors import ConfigError

StageName = Literal[
    "url_filter", "language", "c4", "gopher_repetition", "gopher_quality", "fineweb", "pii",
    "quality", "bad_words", "decontaminate", "url", "line_dedup", "span_dedup", "paragraph_dedup",
    "exact", "substring", "minhash",
]  # fmt: skip
"""Stages between extraction and the split; the order in the list is the order they run in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Everything that decides what comes out."""

    stages: tuple[StageName, ...]
    """Stages between extraction and the split, in the order they run in."""
    skip: tuple[StageName, ...] = ()
    """Stages of the list that are left out."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    """Fields of inputs that hold text already."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """Extraction."""
    url_filter: UrlFilterConfig = field(default_factory=UrlFilterConfig)
    """Block lists of addresses."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Languages."""
    c4: C4Config = field(default_factory=C4Config)
    """C4's rules."""
    gopher_repetition: GopherRepetitionConfig = field(default_factory=GopherRepetitionConfig)
    """Gopher's rules for repetition."""
    gopher_quality: GopherQualityConfig = field(default_factory=GopherQualityConfig)
    """Gopher's rules for quality."""
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    """FineWeb's rules."""
    pii: PiiConfig = field(default_factory=PiiConfig)
    """Personal data and secrets."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """Score of a classifier."""
    bad_words: BadWordsConfig = field(default_factory=BadWordsConfig)
    """Word list."""
    decontaminate: DecontaminationConfig = field(default_factory=DecontaminationConfig)
    """Overlap with evaluation sets."""
    url: UrlDedupConfig = field(default_factory=UrlDedupConfig)
    """Pages crawled twice."""
    span_dedup: SpanConfig = field(default_factory=SpanConfig)
    """Repeated spans of sentences."""
    paragraph_dedup: ParagraphConfig = field(default_factory=ParagraphConfig)
    """Repeated paragraphs."""
    exact: ExactConfig = field(default_factory=ExactConfig)
    """Equal documents."""
    substring: SubstringConfig = field(default_factory=SubstringConfig)
    """Repeated substrings."""
    minhash: MinHashConfig = field(default_factory=MinHashConfig)
    """Near-duplicates."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Held-out documents."""
    tokenizer: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    """Tokenizer."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Token stores."""
    memory_gib: float = 4.0
    """Memory the keyed stages may use per worker; it decides the number of buckets."""

    def __post_init__(self) -> None:
        """Refuse lists of stages that cannot run."""
        twice = sorted({stage for stage in self.stages if self.stages.count(stage) > 1})
        if twice:
            raise ConfigError(f"stages names {twice[0]} twice; name it once")
        unknown = [stage for stage in self.skip if stage not in self.stages]
        if unknown:
            raise ConfigError(
                f"skip names {unknown[0]}, which is none of stages=[{', '.join(self.stages)}]; "
                "leave it out"
            )
        check_positive(memory_gib=self.memory_gib)


def check_pipeline(config: PipelineConfig) -> None:
    """Raise ConfigError for settings that would do nothing, or could not do what they say."""
    stages = [stage for stage in config.stages if stage not in config.skip]
    problems = [
        f"{setting} is set, but {stage} is none of stages=[{', '.join(config.stages)}]; add it "
        "there, or leave the setting out"
        for stage, setting in _given(config)
        if stage not in config.stages
    ]
    problems += [*_without_labels(config, stages), *_too_large(config, stages)]
    if problems:
        raise ConfigError([f"pipeline.{problem}" for problem in problems])


def _without_labels(config: PipelineConfig, stages: Sequence[str]) -> Iterator[str]:
    """Yield the settings that read what an earlier stage would have to write."""
    sources = {
        "gopher_quality": config.gopher_quality.per_language,
        "gopher_repetition": config.gopher_repetition.per_language,
        "fineweb": config.fineweb.per_language,
    }
    for number, stage in enumerate(stages):
        source, before = sources.get(stage), stages[:number]
        if source is not None and "language" not in before:
            yield (
                f"{stage}.per_language={source} needs the language of a document, but no stage "
                f"language runs before {stage} in stages=[{', '.join(stages)}]; put it there, or "
                "use per_language=null"
            )
        scored = "quality" in before or "quality" in config.fields.metadata
        if stage == "minhash" and config.minhash.keep == "quality" and not scored:
            yield (
                "minhash.keep=quality needs scores, but no stage quality runs before minhash in "
                f"stages=[{', '.join(stages)}] and fields.metadata names no field quality; put the "
                "stage there, or use keep=longest"
            )


def _too_large(config: PipelineConfig, stages: Sequence[str]) -> Iterator[str]:
    """Yield a size that the memory of a worker does not hold."""
    size, memory = config.substring.block_bytes or 0, int(config.memory_gib * 2**30)
    if "substring" in stages and size * SUBSTRING_MEMORY > memory:
        yield (
            f"substring.block_bytes={size} takes {size * SUBSTRING_MEMORY / 2**30:.2f} GiB, more "
            f"than memory_gib={config.memory_gib:g}; use block_bytes={memory // SUBSTRING_MEMORY} "
            "at most"
        )


def _given(config: PipelineConfig) -> list[tuple[str, str]]:
    """Return (stage, setting) of what only a user gives: files, programs, earlier runs."""
    given = {
        ("bad_words", "path"): config.bad_words.path,
        ("decontaminate", "benchmarks"): config.decontaminate.benchmarks,
        ("quality", "model"): config.quality.model,
        ("quality", "command"): config.quality.command,
        ("url", "against"): config.url.against,
        ("url", "keep_keys"): config.url.keep_keys,
        ("exact", "against"): config.exact.against,
        ("exact", "keep_keys"): config.exact.keep_keys,
        ("minhash", "against"): config.minhash.against,
        ("minhash", "keep_keys"): config.minhash.keep_keys,
    }
    return [(stage, f"{stage}.{name}") for (stage, name), value in given.items() if value]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """``llmtrain-data run``."""

    input: Mapping[str, str | tuple[str, ...]]
    """Source name -> path, glob, folder or hf:NAME, or a list of them."""
    out: str
    """Folder of the stages, the tokenizer, the stores and the funnel."""
    pipeline: PipelineConfig
    """What to do."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Where tasks run: processes of this machine, a Ray cluster, or jobs of Slurm."""
    num_workers: int = 1
    """Tasks at a time; never changes a byte of what comes out."""
    time_limit_s: float = 3600.0
    """Seconds one attempt at one task may take."""
    ray: RayConfig = field(default_factory=RayConfig)
    """Ray, where it is the executor."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """Slurm, where it is the executor."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(num_workers=self.num_workers, time_limit_s=self.time_limit_s)
        check_pipeline(self.pipeline)
        for name in ("ray", "slurm"):
            if name != self.executor:
                check_unread(self, name, f"executor={name}")
        if self.executor == "slurm" and self.slurm.hours * 3600 < 2 * self.time_limit_s:
            raise ConfigError(
                f"slurm.hours={self.slurm.hours:g} leaves no room for a task of "
                f"time_limit_s={self.time_limit_s:g}; use slurm.hours="
                f"{2 * self.time_limit_s / 3600:g} or more"
            )
