"""Hugging Face ``tokenizer.json``: applied as it is, or trained as byte-level BPE.

Byte-level BPE has a token for each of the 256 bytes and merges inside the words of a pattern
(``patterns``), so ``decode(encode(text)) == text`` for every text. The names of special tokens that
stand in a text are text: they are spelled out, never turned into the id that ends a document.

    train_byte_bpe(texts, Path("tokenizer"), vocab_size=32_000)
"""

import importlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.tokenizer.files import (
    CONFIG_FILE,
    JSON_FILE,
    content_hash,
    read_object,
    write_trained,
)
from llmtrain.tokenizer.patterns import PatternName, pattern
from llmtrain.tokenizer.texts import Sample, no_utf8

logger = logging.getLogger(__name__)

EOS_TOKEN = "<|endoftext|>"
"""Piece that ends a document in the tokenizers trained here; its id is 0."""
NUM_SPECIAL_AND_BYTES = 1 + 256
_USUAL_EOS = ("</s>", EOS_TOKEN, "<|end_of_text|>", "<eos>")


class JsonTokenizer:
    """A Hugging Face ``tokenizer.json``, run by the ``tokenizers`` package."""

    def __init__(self, path: Path) -> None:
        """Read ``path``; the EOS is the one its ``tokenizer_config.json`` or its pieces name.

        Raises:
            DataError: the file is none, it names no EOS, or the package is missing.
        """
        tokenizers = _package(path)
        raw = path.read_bytes()
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:  # the package raises plain Exception
            raise DataError(f"{path} is not a tokenizer.json ({error}); copy it again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # their names in a text are text
        self.path = path
        self.hash = content_hash(raw)
        self.library = f"tokenizers {tokenizers.__version__}"
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids)  # ids may leave gaps
        self.eos_id = self._find_eos(path)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on one thread."""
        encode = self._tokenizer.encode_batch_fast  # without offsets; a list of one stays here
        try:
            return [list(encode([text], add_special_tokens=False)[0].ids) for text in texts]
        except (UnicodeEncodeError, TypeError) as error:
            raise no_utf8(error) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        return str(self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True))

    def _find_eos(self, path: Path) -> int:
        config = path.with_name(CONFIG_FILE)
        named = read_object(config).get("eos_token") if config.is_file() else None
        if isinstance(named, dict):
            named = named.get("content")
        for piece in (named,) if named else _USUAL_EOS:
            found = self._tokenizer.token_to_id(piece)
            if found is not None:
                return int(found)
        raise DataError(
            f"{path} has no end-of-text piece ({named or ', '.join(_USUAL_EOS)}); put a "
            f'{CONFIG_FILE} with "eos_token" beside it'
        )


def train_byte_bpe(
    texts: Iterable[str],
    directory: Path | str,
    *,
    vocab_size: int,
    pattern_name: PatternName = "gpt4_digits",
    max_sample_bytes: int = 100_000_000,
) -> JsonTokenizer:
    """Train on the first ``max_sample_bytes`` of ``texts``; the same texts give the same bytes.

    Writes ``tokenizer.json``, ``tokenizer_config.json`` and, last, ``llmtrain_tokenizer.json``.

    Raises:
        DataError: the texts are too few for the vocabulary, or the vocabulary is too small.
    """
    folder = Path(directory)
    tokenizers = _package(folder / JSON_FILE)
    if vocab_size <= NUM_SPECIAL_AND_BYTES:
        raise DataError(
            f"vocab_size={vocab_size} leaves no room beside {NUM_SPECIAL_AND_BYTES} special and "
            "byte tokens; use 512 or more"
        )
    model, sample = _untrained(tokenizers, pattern(pattern_name)), Sample(texts, max_sample_bytes)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS_TOKEN], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    model.train_from_iterator(iter(sample), trainer)
    found = model.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise DataError(
            f"{vocab_size} tokens cannot be trained on {sample.num_texts} texts of "
            f"{sample.num_bytes:,} bytes; use at most {found}"
        )
    content = model.to_str(pretty=True).encode()
    meta = {
        "hash": content_hash(content), "eos_id": model.token_to_id(EOS_TOKEN),
        "sample": sample.counts(), "tokenizers": tokenizers.__version__,
        "settings": {"kind": "byte_bpe", "vocab_size": vocab_size, "pattern": pattern_name},
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    config_content = (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
    write_trained(folder, {JSON_FILE: content, CONFIG_FILE: config_content}, meta)
    logger.info(
        "trained a byte_bpe tokenizer of %d tokens on %d texts (%.1f MB)",
        found, sample.num_texts, sample.num_bytes / 1e6,
    )  # fmt: skip
    return JsonTokenizer(folder / JSON_FILE)


def _untrained(tokenizers: Any, regex: str) -> Any:
    """Return byte-level BPE without merges: words by ``regex``, bytes inside them, no prefix."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = tokenizers.pre_tokenizers
    model.pre_tokenizer = steps.Sequence([
        steps.Split(tokenizers.Regex(regex), behavior="isolated"),
        steps.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    model.decoder = tokenizers.decoders.ByteLevel()
    return model


def _package(path: Path) -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError:
        raise DataError(
            f"{path} needs the tokenizers package: pip install 'tokenizers>=0.22'"
        ) from None
