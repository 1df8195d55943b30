"""tiktoken rank files: ``NAME.tiktoken`` and, beside it, ``NAME.json`` with what the ranks lack.

The rank file has one line per token, its bytes in base64 and its id. The JSON says how text is cut
into words and which ids are special; ``eos_token`` names the one that ends a document:

    {"pattern": "gpt4", "special_tokens": {"<|endoftext|>": 100257}, "eos_token": "<|endoftext|>"}

``pattern`` is a name of ``patterns`` or a regular expression. The names of special tokens that
stand in a text are text.
"""

import base64
import binascii
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.tokenizer.files import content_hash
from llmtrain.tokenizer.patterns import NAMES, PATTERNS
from llmtrain.tokenizer.texts import no_utf8

_EXAMPLE = (
    '{"pattern": "gpt4", "special_tokens": {"<|endoftext|>": 100257}, "eos_token": "<|endoftext|>"}'
)


class RanksTokenizer:
    """A tiktoken rank file, run by the ``tiktoken`` package."""

    def __init__(self, path: Path) -> None:
        """Read ``path`` and the JSON beside it.

        Raises:
            DataError: either is missing or damaged, or the package is not installed.
        """
        try:
            tiktoken: Any = importlib.import_module("tiktoken")
        except ModuleNotFoundError:
            raise DataError(
                f"{path} needs the tiktoken package: pip install 'tiktoken>=0.12'"
            ) from None
        raw = path.read_bytes()
        described = path.with_suffix(".json")
        description = _read_description(described)
        self.path = path
        self.pattern: str = dict[str, str](PATTERNS.items()).get(
            description["pattern"], description["pattern"]
        )
        self.special_tokens: dict[str, int] = description["special_tokens"]
        self._special_ids = frozenset(self.special_tokens.values())
        ranks = _read_ranks(path, raw)
        try:
            self._encoding: Any = tiktoken.Encoding(
                path.stem, pat_str=self.pattern, mergeable_ranks=ranks,
                special_tokens=self.special_tokens,
            )  # fmt: skip
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"{described}: tiktoken refuses it with the ranks of {path.name} ({error}); "
                f"correct its pattern (one of {', '.join(NAMES)}, or a regular expression) or ids"
            ) from None
        self.library = f"tiktoken {tiktoken.__version__}"
        canonical = json.dumps(description, sort_keys=True).encode()
        self.hash = content_hash(content_hash(raw).encode() + canonical)
        self.vocab_size = 1 + max(*ranks.values(), *self._special_ids)
        self.eos_id = self.special_tokens[description["eos_token"]]

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on one thread."""
        for text in texts:
            _check_utf8(text)  # tiktoken would put another character in its place
        return [self._encoding.encode_ordinary(text) for text in texts]

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that an id spells; they may be a part of a character."""
        return bytes(self._encoding.decode_single_token_bytes(token))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        ordinary = [int(id_) for id_ in ids if int(id_) not in self._special_ids]
        return str(self._encoding.decode_bytes(ordinary).decode("utf-8", errors="replace"))


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise no_utf8(error) from None


def _read_ranks(path: Path, raw: bytes) -> dict[bytes, int]:
    """Return token bytes -> id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path}, line {number}: found {line[:40]!r}, expected the base64 of a token and "
                "its id; copy the file again"
            ) from None
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing:
        raise DataError(
            f"{path} has no token for {missing} of the 256 bytes; it is cut: copy it again"
        )
    return ranks


def _read_description(path: Path) -> dict[str, Any]:
    """Return the checked content of the JSON beside a rank file."""
    if not path.is_file():
        raise DataError(f"{path} is missing; a rank file needs it beside it, such as {_EXAMPLE}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        description = {
            "pattern": str(found["pattern"]),
            "special_tokens": {str(k): int(v) for k, v in found["special_tokens"].items()},
            "eos_token": str(found["eos_token"]),
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} does not describe a rank file ({error!r}); expected {_EXAMPLE}"
        ) from None
    if description["eos_token"] not in description["special_tokens"]:
        raise DataError(
            f"{path}: eos_token {description['eos_token']!r} is none of its special_tokens; add "
            "it there with its id"
        )
    return description
