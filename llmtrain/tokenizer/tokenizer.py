r"""Text to token ids and back without losing a character; SentencePiece training that keeps this.

``decode(encode(text)) == text`` for every text that UTF-8 can hold. Three things make it so.
Nothing is normalised, stripped or prefixed. What no piece covers is spelled in byte pieces, and so
is every newline: the trainer sees single lines, no piece contains a newline, and each costs one
token (<0x0A>). U+2581, which SentencePiece uses for the space, is cut out of the text and spelled
in byte pieces too.

    train_sentencepiece(texts, Path("tokenizer"), vocab_size=2048)
    tokenizer = load("tokenizer")
    tokenizer.decode(tokenizer.encode("one\n  two")) == "one\n  two"
"""

import importlib
import io
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import blake3

from llmtrain.errors import DataError

logger = logging.getLogger(__name__)

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
META_FILE = "llmtrain_tokenizer.json"
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

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without BOS or EOS."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with byte fallback."""

    def __init__(self, model: bytes, origin: str) -> None:
        """Take the bytes of a ``tokenizer.model``; ``origin`` names it in messages."""
        import sentencepiece

        self._processor: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError):
            raise DataError(
                f"{origin} is not a SentencePiece model ({len(model):,} bytes, cut or of another "
                "kind); check the path or copy it again"
            ) from None
        self.hash = str(blake3.blake3(model).hexdigest())
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
        """Return the ids of each text."""
        try:
            encoded: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(
                f"a text is no UTF-8, it may hold a lone surrogate ({error}); decode the source "
                "with errors='replace'"
            ) from None
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


class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``, run by the ``tokenizers`` package."""

    def __init__(self, path: Path) -> None:
        """Read ``path``; the EOS is the one its ``tokenizer_config.json`` or its pieces name."""
        try:
            tokenizers: Any = importlib.import_module("tokenizers")
        except ModuleNotFoundError:
            raise DataError(
                f"{path} needs the tokenizers package: pip install 'tokenizers>=0.22'"
            ) from None
        raw = path.read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{path} is not a tokenizer.json ({error}); copy it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.hash = str(blake3.blake3(raw).hexdigest())
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids)  # ids may leave gaps
        self.eos_id = self._find_eos(path)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without BOS or EOS."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [list(one.ids) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))

    def _find_eos(self, path: Path) -> int:
        config = path.with_name("tokenizer_config.json")
        named = json.loads(config.read_text()).get("eos_token") if config.is_file() else None
        if isinstance(named, dict):
            named = named.get("content")
        usual = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
        for piece in (named,) if named else usual:
            found = self._tokenizer.token_to_id(piece)
            if found is not None:
                return int(found)
        raise DataError(
            f"{path} has no end-of-text piece ({named or ', '.join(usual)}); put a "
            'tokenizer_config.json with "eos_token" beside it'
        )


def load(path: Path | str) -> Tokenizer:
    """Load a tokenizer folder, a SentencePiece ``.model`` or a ``tokenizer.json``.

    Raises:
        DataError: nothing to load there, damaged, or changed since it was trained.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (MODEL_FILE, JSON_FILE) if (path / name).is_file()]
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise DataError(
            f"{path} holds no tokenizer; expected a folder with {MODEL_FILE} (SentencePiece) or "
            f"{JSON_FILE} (Hugging Face), or such a file: check the path"
        )
    tokenizer: SentencePieceTokenizer | JsonTokenizer
    if found[0].suffix == ".json":
        tokenizer = JsonTokenizer(found[0])
    else:
        tokenizer = SentencePieceTokenizer(found[0].read_bytes(), str(found[0]))
    meta = found[0].with_name(META_FILE)
    if meta.is_file() and json.loads(meta.read_text()).get("hash") != tokenizer.hash:
        raise DataError(
            f"{found[0]} was changed after it was trained: its hash is not the one in {meta}; "
            "restore it or train it again"
        )
    return tokenizer


def train_sentencepiece(
    texts: Iterable[str],
    directory: Path | str,
    *,
    vocab_size: int,
    kind: Literal["bpe", "unigram"] = "bpe",
    max_sample_bytes: int = 100_000_000,
    character_coverage: float = 0.9995,
) -> Tokenizer:
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
    model, sample = io.BytesIO(), _Sample(texts, max_sample_bytes)
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sample), model_writer=model, minloglevel=2, **settings
        )
    except RuntimeError as error:
        raise _training_failed(error, vocab_size, sample) from None
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(folder / MODEL_FILE))
    meta = {
        "hash": tokenizer.hash,
        "eos_id": tokenizer.eos_id,
        "sample": {"texts": sample.num_texts, "bytes": sample.num_bytes},
        "sentencepiece": sentencepiece.__version__,
        "settings": settings,
    }
    (folder / META_FILE).unlink(missing_ok=True)
    _write_aside(folder / MODEL_FILE, model.getvalue())
    _write_aside(folder / META_FILE, (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())
    logger.info(
        "trained a %s tokenizer of %d pieces on %d texts (%.1f MB)",
        kind, tokenizer.vocab_size, sample.num_texts, sample.num_bytes / 1e6,
    )  # fmt: skip
    return tokenizer


class _Sample:
    """The lines of the first texts, and how much they were."""

    def __init__(self, texts: Iterable[str], max_bytes: int) -> None:
        self._texts = texts
        self._max_bytes = max_bytes
        self.num_texts = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            if self.num_bytes >= self._max_bytes:
                return
            self.num_texts += 1
            self.num_bytes += len(text.encode())
            yield from filter(None, LINE_BREAKS.split(text))


def _training_failed(error: RuntimeError, vocab_size: int, sample: _Sample) -> DataError:
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


def _write_aside(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
