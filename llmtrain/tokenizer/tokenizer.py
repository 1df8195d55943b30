r"""Text to token ids and back without losing a character: what every tokenizer here can do.

``decode(encode(text)) == text`` for every text that UTF-8 can hold, for the tokenizers trained
here. ``load`` opens SentencePiece models, Hugging Face ``tokenizer.json`` and tiktoken rank files;
``train`` makes the first two.

    train(texts, Path("tokenizer"), kind="byte_bpe", vocab_size=32_000)
    tokenizer = load("tokenizer")
    tokenizer.decode(tokenizer.encode("one\n  two")) == "one\n  two"
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from llmtrain.errors import DataError
from llmtrain.tokenizer.byte_level import JsonTokenizer, train_byte_bpe
from llmtrain.tokenizer.files import (
    JSON_FILE,
    META_FILE,
    MODEL_FILE,
    RANKS_SUFFIX,
    read_object,
)
from llmtrain.tokenizer.patterns import PatternName
from llmtrain.tokenizer.ranks import RanksTokenizer
from llmtrain.tokenizer.sentence_piece import SentencePieceTokenizer, train_sentencepiece

TokenizerKind = Literal["bpe", "unigram", "byte_bpe"]
"""What can be trained: SentencePiece BPE or unigram, Hugging Face byte-level BPE."""


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def hash(self) -> str:
        """blake3 hex of the bytes of the tokenizer's file; token stores keep it."""
        ...

    @property
    def library(self) -> str:
        """Name and version of the package that encodes."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without BOS or EOS."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on one thread."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        ...


def load(path: Path | str) -> Tokenizer:
    """Load a tokenizer folder, a SentencePiece ``.model``, ``tokenizer.json`` or ``.tiktoken``.

    Raises:
        DataError: nothing to load there, damaged, or changed since it was trained.
    """
    found = find(Path(path))
    if found is None:
        raise DataError(
            f"{path} holds no tokenizer; expected a folder with {MODEL_FILE} (SentencePiece), "
            f"{JSON_FILE} (Hugging Face) or one *{RANKS_SUFFIX} (tiktoken), or such a file: check "
            "the path"
        )
    tokenizer: Tokenizer
    if found.suffix == ".json":
        tokenizer = JsonTokenizer(found)
    elif found.suffix == RANKS_SUFFIX:
        tokenizer = RanksTokenizer(found)
    else:
        tokenizer = SentencePieceTokenizer(found.read_bytes(), str(found))
    meta = found.with_name(META_FILE)
    if meta.is_file() and read_object(meta).get("hash") != tokenizer.hash:
        raise DataError(
            f"{found} was changed after it was trained: its hash is not the one in {meta}; "
            "restore it or train it again"
        )
    return tokenizer


def find(path: Path) -> Path | None:
    """Return the file that defines the tokenizer at ``path``, a folder or that file itself.

    Raises:
        DataError: a folder holds several rank files.
    """
    if path.is_file():
        return path
    named = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).is_file()]
    ranks = sorted(path.glob(f"*{RANKS_SUFFIX}")) if path.is_dir() else []
    if len(ranks) > 1 and not named:
        raise DataError(
            f"{path} holds {len(ranks)} rank files ({ranks[0].name}, {ranks[1].name}); name the "
            "one to use"
        )
    return next(iter([*named, *ranks]), None)


def train(
    texts: Iterable[str],
    directory: Path | str,
    *,
    kind: TokenizerKind,
    vocab_size: int,
    pattern: PatternName = "gpt4_digits",
    max_sample_bytes: int = 100_000_000,
) -> Tokenizer:
    """Train a tokenizer of any kind; ``pattern`` (see ``patterns``) is for byte_bpe alone.

    Raises:
        DataError: the texts are too few for the vocabulary, or the vocabulary is too small.
    """
    if kind == "byte_bpe":
        return train_byte_bpe(
            texts, directory, vocab_size=vocab_size, pattern_name=pattern,
            max_sample_bytes=max_sample_bytes,
        )  # fmt: skip
    return train_sentencepiece(
        texts, directory, vocab_size=vocab_size, kind=kind, max_sample_bytes=max_sample_bytes
    )
