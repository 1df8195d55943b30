"""Settings of the commands beside ``run``."""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.config.checks import check_positive, check_seed, check_share, check_unread
from llmtrain.config.run import RunConfig as TrainConfig
from llmtrain.errors import ConfigError


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
    part_bytes: int = 256_000_000
    """Largest number of bytes of text behind one .bin file, save for a document that is larger."""
    shuffle: bool = False
    """Whether the documents stand in the order of a hash, over all parts; false keeps theirs."""
    shuffle_seed: int = 0
    """Another seed is another order."""
    memory_gib: float = 4.0
    """Memory a worker may use; changes no byte."""
    num_workers: int = 1
    """Worker processes."""
    time_limit_s: float = 36_000.0
    """Seconds one attempt at one file may take."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_share(self.validation_share)
        check_positive(
            num_workers=self.num_workers, time_limit_s=self.time_limit_s,
            memory_gib=self.memory_gib, part_bytes=self.part_bytes,
        )  # fmt: skip
        check_seed(self.shuffle_seed)
        if not self.shuffle:
            check_unread(self, "shuffle_seed", "shuffle=true")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainTokenizerConfig:
    """``llmtrain-data tokenizer``: train a tokenizer on clean text."""

    input: str | tuple[str, ...]
    """Path, glob, folder or hf:NAME, or a list of them."""
    out: str
    """Folder of the tokenizer."""
    vocab_size: int = 32_000
    """Pieces."""
    kind: Literal["bpe", "unigram", "byte_bpe"] = "bpe"
    """SentencePiece BPE or unigram, or byte-level BPE (Hugging Face tokenizer.json)."""
    pattern: Literal["gpt2", "gpt4", "gpt4_digits", "gpt4o", "gpt4o_digits"] = "gpt4_digits"
    """What cuts text into words for byte_bpe; merges never cross them, _digits splits numbers."""
    sample_bytes: int = 200_000_000
    """Bytes of text it is trained on, chosen over the whole input by a hash of the ids."""
    text_field: str = "text"
    """Field with the text."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(vocab_size=self.vocab_size, sample_bytes=self.sample_bytes)
        if self.kind != "byte_bpe":
            check_unread(self, "pattern", "kind=byte_bpe")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierConfig:
    """``llmtrain-data classifier``: train a linear classifier for the quality stage."""

    positive: str | tuple[str, ...]
    """Texts that are wanted: path, glob, folder or hf:NAME, or a list of them."""
    negative: str | tuple[str, ...]
    """Texts that are not wanted, or plain crawl."""
    out: str
    """File of the model."""
    max_documents: int = 50_000
    """Texts of each class at most, the first ones of every file in equal shares."""
    bucket_bits: int = 20
    """Weights as a power of two, 12 to 28; words and pairs of words share them by hash."""
    max_words: int = 1000
    """Words of a text that are looked at, in training and in use."""
    epochs: int = 5
    """Passes over the texts."""
    learning_rate: float = 0.3
    """Step size at the start; it falls to zero."""
    text_field: str = "text"
    """Field with the text."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(
            max_documents=self.max_documents, max_words=self.max_words, epochs=self.epochs,
            learning_rate=self.learning_rate,
        )  # fmt: skip
        if not 12 <= self.bucket_bits <= 28:
            raise ConfigError(f"bucket_bits={self.bucket_bits}; use a number from 12 to 28")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """``llmtrain-data pack``: count the windows that best-fit packing makes of a token store."""

    store: str
    """Folder of the store, or path prefix of another program's."""
    sequence_length: int
    """Tokens of a window, as training.sequence_length will be."""
    num_workers: int = 1
    """Worker processes."""
    time_limit_s: float = 36_000.0
    """Seconds one attempt at a run of blocks may take."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(
            sequence_length=self.sequence_length, num_workers=self.num_workers,
            time_limit_s=self.time_limit_s,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MixturePlanConfig:
    """``llmtrain-data mixture``: what a training run would read, before it begins."""

    run: str | None = None
    """Folder of a run, whose plan is told; or give the overrides of ``llmtrain train``."""
    plot: str | None = None
    """File for the plan as one HTML page."""
    json: str | None = None
    """File for the plan as JSON; - prints it and no table."""
    train: TrainConfig | None = None
    """The training configuration: made of the other overrides, never given by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketsConfig:
    """``llmtrain-data buckets``: a token store cut by a score of its documents."""

    store: str
    """Folder of the store."""
    out: str
    """Folder for the stores ``bucket-1``, ``bucket-2``, ..., the lowest scores first."""
    by: str
    """length (tokens), FILE.parquet with the columns id and score, or the name of a number that
    `llmtrain-data run` noted with the documents, such as quality."""
    buckets: int = 4
    """Stores to make, of about equal tokens."""
    data: str | None = None
    """Folder that ``llmtrain-data run`` wrote, for its numbers; null looks beside the store."""
    num_workers: int = 1
    """Worker processes."""
    time_limit_s: float = 36_000.0
    """Seconds one attempt at one part of the store may take."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(num_workers=self.num_workers, time_limit_s=self.time_limit_s)
        if not 2 <= self.buckets <= 256:
            raise ConfigError(f"buckets={self.buckets}; use a number from 2 to 256")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReopenConfig:
    """``llmtrain-data reopen``: the raw records behind documents of token stores."""

    requests: str
    """File of JSON lines, one for each document; - reads them from standard input."""
    raw: str | tuple[str, ...] = ()
    """Paths, folders or globs where raw files lie that are not where they were read."""
    records: bool = True
    """Whether to open the records and extract them again."""
    rules: bool = False
    """Whether to tell what each rule of the pipeline changed."""

    def __post_init__(self) -> None:
        """Refuse to do nothing."""
        if not self.records and not self.rules:
            raise ConfigError("records=false and rules=false ask for nothing; set one of them true")
