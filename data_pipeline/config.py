"""Settings of the data pipeline; YAML groups under ``conf/pipeline`` fill them.

What is in ``PipelineConfig`` decides bytes; what stands beside it (workers, time limit) does not.

    config = load("data_run", ["pipeline=demo", "input.web=crawl", "out=corpus"], RunConfig)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.errors import ConfigError

StageName = Literal["url", "c4", "line_dedup", "language", "bad_words", "exact", "minhash"]
"""Stages between extraction and the split; the order in the list is the order they run in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractConfig:
    """From raw files to documents."""

    max_characters: int = 190_000
    """Longest text that is kept, in characters; C4 drops longer pages before anything else."""
    shard_bytes: int = 64_000_000
    """Bytes of text in one document shard; a shard is the unit of work and of retry."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(max_characters=self.max_characters, shard_bytes=self.shard_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class C4Config:
    """C4's rules for lines and pages."""

    variant: Literal["c4", "c4_fast", "datatrove", "dolma", "fineweb"] = "c4"
    """Thresholds and sentence splitter: c4 as published with punkt, c4_fast with a splitter by
    rules, the others with the defaults of the tool they are named for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """Which languages stay."""

    method: Literal["langdetect", "fasttext"] = "langdetect"
    """Identifier: langdetect as in C4, or fastText, which is much faster."""
    languages: tuple[str, ...] = ("en",)
    """ISO-639-1 codes that stay; an empty list keeps all and only labels them."""
    threshold: float = 0.99
    """Smallest score in [0, 1] that counts."""

    def __post_init__(self) -> None:
        """Refuse scores that are none."""
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"threshold={self.threshold} is no score; use a number in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class BadWordsConfig:
    """Pages with a word of a list go."""

    path: str | None = None
    """File with one word or phrase per line; null leaves the rule out, and the manifest says so."""
    language: str = "en"
    """Language of the list; ja, th and zh match inside words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MinHashConfig:
    """Near-duplicate detection."""

    preset: Literal["fineweb", "slimpajama", "redpajama_v2", "olmo"] = "fineweb"
    """Shingles, bands and rows of a published corpus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Held-out documents."""

    key: Literal["cluster", "url"] = "cluster"
    """What is hashed: the near-duplicate cluster (without the minhash stage, the document alone),
    or the address as in C4."""
    validation_share: float = 0.001
    """Share of the documents held out, in [0, 1); of addresses, a number of thousandths."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        check_share(self.validation_share)
        thousandths = self.validation_share * 1000
        if self.key == "url" and abs(thousandths - round(thousandths)) > 1e-9:
            raise ConfigError(
                f"validation_share={self.validation_share} is no number of thousandths, which "
                f"key=url counts in; use {max(1, round(thousandths)) / 1000}, or key=cluster"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerTrainingConfig:
    """The tokenizer of the stores: trained here, or given."""

    path: str | None = None
    """Folder of a tokenizer to use; null trains one on the training documents."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """Algorithm of the one trained here."""
    vocab_size: int = 32_000
    """Pieces of the one trained here."""
    sample_bytes: int = 200_000_000
    """Bytes of text it is trained on, chosen by a hash of the document ids."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(vocab_size=self.vocab_size, sample_bytes=self.sample_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Token stores."""

    part_bytes: int = 256_000_000
    """Bytes of text behind one .bin file; a part is the unit of work of tokenizing."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(part_bytes=self.part_bytes)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig:
    """Everything that decides what comes out."""

    stages: tuple[StageName, ...]
    """Stages between extraction and the split, in the order they run in."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    """Fields of inputs that hold text already."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    """Extraction."""
    c4: C4Config = field(default_factory=C4Config)
    """C4's rules."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Languages."""
    bad_words: BadWordsConfig = field(default_factory=BadWordsConfig)
    """Word list."""
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
        check_positive(memory_gib=self.memory_gib)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """``llmtrain-data run``."""

    input: Mapping[str, str | tuple[str, ...]]
    """Source name -> path, glob, folder or hf:NAME, or a list of them."""
    out: str
    """Folder of the stages, the tokenizer, the stores and the funnel."""
    pipeline: PipelineConfig
    """What to do."""
    executor: Literal["local"] = "local"
    """Where tasks run."""
    num_workers: int = 1
    """Worker processes; never changes a byte of what comes out."""
    time_limit_s: float = 3600.0
    """Seconds one attempt at one task may take."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(num_workers=self.num_workers, time_limit_s=self.time_limit_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeConfig:
    """``llmtrain-data tokenize``: clean text to a token store, with nothing done to it."""

    input: str | tuple[str, ...]
    """Path, glob, folder or hf:NAME, or a list of them."""
    tokenizer: str
    """Tokenizer folder."""
    out: str
    """Folder of the store; its name is the name of the source."""
    validation_share: float = 0.0
    """Share of the documents held out, in [0, 1), by a hash of their ids; they go to a store of
    their own, OUT/validation."""
    text_field: str = "text"
    """Field with the text."""
    id_field: str | None = None
    """Field with a stable, unique id; null numbers the rows of each file."""
    num_workers: int = 1
    """Worker processes."""
    time_limit_s: float = 36_000.0
    """Seconds one attempt at one file may take."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_share(self.validation_share)
        check_positive(num_workers=self.num_workers, time_limit_s=self.time_limit_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig:
    """``llmtrain-data tokenizer``: train a tokenizer on clean text."""

    input: str | tuple[str, ...]
    """Path, glob, folder or hf:NAME, or a list of them."""
    out: str
    """Folder of the tokenizer."""
    vocab_size: int = 32_000
    """Pieces."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """Algorithm."""
    sample_bytes: int = 200_000_000
    """Bytes of text it is trained on, the same number from every file."""
    text_field: str = "text"
    """Field with the text."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(vocab_size=self.vocab_size, sample_bytes=self.sample_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """``llmtrain-data sample``: a crawl made from the documentation on this machine."""

    out: str
    """Folder of the crawl."""
    pages: int | None = None
    """Largest number of pages; null takes all up to the built-in cap."""

    def __post_init__(self) -> None:
        """Refuse numbers that are none."""
        if self.pages is not None:
            check_positive(pages=self.pages)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """``llmtrain-data verify``: check every byte of a token store."""

    store: str
    """Folder of the store."""


def check_positive(**numbers: float) -> None:
    """Raise ConfigError naming every number that is 0 or less."""
    problems = [
        f"{name}={value}; use a number above 0" for name, value in numbers.items() if value <= 0
    ]
    if problems:
        raise ConfigError(problems)


def check_share(share: float) -> None:
    """Raise ConfigError for a share of documents that is none."""
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"validation_share={share}; use a number in [0, 1)")
