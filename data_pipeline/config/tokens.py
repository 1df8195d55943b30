"""Settings of the last stages: held-out documents, tokenizer, token stores."""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.config.checks import check_positive, check_seed, check_share, check_unread
from llmtrain.errors import ConfigError


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
    kind: Literal["bpe", "unigram", "byte_bpe"] = "bpe"
    """Kind of the one trained here: SentencePiece BPE or unigram, or byte-level BPE (Hugging Face
    tokenizer.json), which encodes ten times faster."""
    pattern: Literal["gpt2", "gpt4", "gpt4_digits", "gpt4o", "gpt4o_digits"] = "gpt4_digits"
    """What cuts text into words for byte_bpe; merges never cross them, _digits splits numbers."""
    vocab_size: int = 32_000
    """Pieces of the one trained here."""
    sample_bytes: int = 200_000_000
    """Bytes of text it is trained on, chosen by a hash of the document ids; at most a twelfth of
    memory_gib, or a twenty-fourth for unigram, which is what training takes."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(vocab_size=self.vocab_size, sample_bytes=self.sample_bytes)
        if self.kind != "byte_bpe":
            check_unread(self, "pattern", "kind=byte_bpe")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """Token stores."""

    part_bytes: int = 256_000_000
    """Largest number of bytes of text behind one .bin file, save for a document that is larger."""
    shuffle: bool = True
    """Whether the documents of a source stand in the order of a hash, over all its parts; false
    keeps the order they were read in."""
    shuffle_seed: int = 0
    """Another seed is another order."""

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        check_positive(part_bytes=self.part_bytes)
        check_seed(self.shuffle_seed)
        if not self.shuffle:
            check_unread(self, "shuffle_seed", "shuffle=true")
