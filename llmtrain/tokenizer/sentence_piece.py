r"""SentencePiece models: applied and trained without losing a character.

Nothing is normalised, stripped or prefixed. What no piece covers is spelled in byte pieces, and so
is every newline: the trainer sees single lines, no piece contains a newline, and each costs one
token (<0x0A>). U+2581, which SentencePiece uses for the space, is cut out of the text and spelled
in byte pieces too.

    train_sentencepiece(texts, Path("tokenizer"), vocab_size=2048)
"""

import io
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from llmtrain.errors import DataError
from llmtrain.tokenizer.files import MODEL_FILE, content_hash, write_trained
from llmtrain.tokenizer.texts import Sample, no_utf8

logger = logging.getLogger(__name__)

SPACE_SYMBOL = "\u2581"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
NUM_SPECIAL_AND_BYTES = 3 + 256
"""Ids every trained vocabulary begins with: <unk>, <s>, </s> and the 256 byte pieces."""
TRAINING_THREADS = 4
"""Fixed, because unigram training depends on it."""
LOSSLESS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "max_sentence_length": 1 << 30,
    "num_threads": TRAINING_THREADS,
    "unk_id": UNK_ID,
    "bos_id": BOS_ID,
    "eos_id": EOS_ID,
    "pad_id": -1,
}
"""Settings of the trainer that every tokenizer made here has."""
LINE_BREAKS = re.compile("[\n\t\0\u2581\u2585]+")
"""What is cut out of training text: newlines (see above) and what the trainer reserves."""
_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback."""

    def __init__(self, model: bytes, origin: str) -> None:
        """Take the bytes of a ``tokenizer.model``; ``origin`` names it in messages.

        Raises:
            DataError: the bytes are no model, or the model has no EOS.
        """
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        if _RANKS.match(model):
            raise DataError(
                f"{origin} holds tiktoken ranks, not a SentencePiece model; rename it to "
                "NAME.tiktoken and put a NAME.json with pattern and special_tokens beside it"
            )
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError):
            raise DataError(
                f"{origin} is not a SentencePiece model ({len(model):,} bytes, cut or of another "
                "kind); check the path or copy it again"
            ) from None
        self.hash = content_hash(model)
        self.library = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size = int(self._processor.vocab_size())
        self.eos_id = int(self._processor.eos_id())
        if self.eos_id < 0:
            raise DataError(
                f"{origin} has no EOS piece; documents could not be told apart: train it with one"
            )
        pieces = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        self._space_symbol = [int(self._processor.piece_to_id(piece)) for piece in pieces]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on one thread."""
        try:
            encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        except (UnicodeEncodeError, TypeError) as error:
            raise no_utf8(error) from None
        for i, text in enumerate(texts):
            if SPACE_SYMBOL in text:
                encoded[i] = self._encode_parts(text.split(SPACE_SYMBOL))
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        return str(self._processor.decode(list(map(int, ids))))

    def _encode_parts(self, parts: list[str]) -> list[int]:
        ids: list[int] = self._processor.encode(parts[0])
        for part in parts[1:]:
            ids += self._space_symbol + self._processor.encode(part)
        return ids


def train_sentencepiece(
    texts: Iterable[str],
    directory: Path | str,
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    max_sample_bytes: int = 100_000_000,
    character_coverage: float = 0.9995,
) -> SentencePieceTokenizer:
    """Train on the first ``max_sample_bytes`` of ``texts``; the same texts give the same bytes.

    Writes ``tokenizer.model`` and, last, ``llmtrain_tokenizer.json`` (settings, sample and hash).

    Raises:
        DataError: the texts are too few for the vocabulary, or the vocabulary is too small.
    """
    import sentencepiece

    if vocab_size <= NUM_SPECIAL_AND_BYTES:
        raise DataError(
            f"vocab_size={vocab_size} leaves no room beside {NUM_SPECIAL_AND_BYTES} special and "
            "byte pieces; use 512 or more"
        )
    settings = {
        **LOSSLESS, "model_type": kind, "vocab_size": vocab_size,
        "character_coverage": character_coverage,
    }  # fmt: skip
    model, sample = io.BytesIO(), Sample(texts, max_sample_bytes)
    lines = (line for text in sample for line in LINE_BREAKS.split(text) if line)
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines, model_writer=model, minloglevel=2, **settings
        )
    except RuntimeError as error:
        raise _training_failed(error, vocab_size, sample) from None
    folder = Path(directory)
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(folder / MODEL_FILE))
    meta = {
        "hash": tokenizer.hash,
        "eos_id": tokenizer.eos_id,
        "sample": sample.counts(),
        "sentencepiece": sentencepiece.__version__,
        "settings": settings,
    }
    write_trained(folder, {MODEL_FILE: model.getvalue()}, meta)
    logger.info(
        "trained a %s tokenizer of %d pieces on %d texts (%.1f MB)",
        kind, tokenizer.vocab_size, sample.num_texts, sample.num_bytes / 1e6,
    )  # fmt: skip
    return tokenizer


def _training_failed(error: RuntimeError, vocab_size: int, sample: Sample) -> DataError:
    found = f"{vocab_size} pieces cannot be trained on {sample.num_texts} texts of "
    limit = re.search(r"value <= (\d+)", str(error))
    if limit:
        return DataError(f"{found}{sample.num_bytes:,} bytes; use at most {limit.group(1)}")
    needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
    if needed:
        return DataError(
            f"{found}{sample.num_bytes:,} bytes: their characters alone take {needed.group(1)}; "
            "use more, or lower character_coverage (the rest is spelled in byte pieces)"
        )
    return DataError(
        f"{found}{sample.num_bytes:,} bytes ({' '.join(str(error).split())}); give more text or a "
        "smaller vocabulary"
    )
