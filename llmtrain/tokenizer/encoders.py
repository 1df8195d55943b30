"""Encoding in bulk: text to one array of ids, through a faster encoder where its ids are the same.

fastokens encodes byte-level BPE (``tokenizer.json`` and tiktoken ranks) 10 to 40 times faster than
the packages these formats come from. It is used only after its ids were found equal to theirs on a
sample of the texts at hand and on ``PROBES``; otherwise they encode, and the reason is told. Either
way the ids are the same. Every encoder here uses one thread: the workers are the parallelism.

    choice = choose_encoder(tokenizer, texts[:256])
    batch = make_encoder(tokenizer, fast=choice.fast).encode(texts)
    batch.ids[batch.offsets[0] : batch.offsets[1]]  # those of texts[0]
"""

import importlib
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError
from llmtrain.tokenizer.byte_level import JsonTokenizer
from llmtrain.tokenizer.ranks import RanksTokenizer
from llmtrain.tokenizer.texts import no_utf8
from llmtrain.tokenizer.tokenizer import Tokenizer

INSTALL = "pip install 'fastokens>=0.3.5,<0.4'"
PROBES = (
    "", " ", "\n", "\r\n\r\n\t x", "  leading, trailing  ", "it's I'LL we'Ve 'S",
    "a1234567 ١٢٣ ²½Ⅷ", "<|endoftext|><|im_start|></s><s>", "/* == */ {};\\n",
    "e\u0301\u0302 हिन्दी ไทย 한글 日本語。「中文」\u3000", "\u00a0\u2028\u200d\ufeff\ufffd\0\x85",
    "\U0001f469\u200d\U0001f467 \U0010ffff", "x" * 300 + "=" * 300 + " " * 300,
    "ǅungla ABCdef camelCase İıẞ",
)  # fmt: skip
"""Texts that tell encoders apart: contractions, digits, marks, spaces, names of special tokens."""
BASE_BYTES, BYTES_PER_TOKEN = 50_000_000, 1_700
"""Memory of fastokens in a worker, measured with vocabularies of 8,000 and 32,000."""
_LISTS = 16
"""Texts whose ids are Python lists at the same time: an id takes ten times its place there."""


class TokenBatch(NamedTuple):
    """The ids of some texts."""

    ids: npt.NDArray[Any]
    """Ids of all texts, one after another, without BOS or EOS."""
    offsets: npt.NDArray[np.int64]
    """[texts + 1]: text i is ``ids[offsets[i] : offsets[i + 1]]``."""


class Encoder(Protocol):
    """Something that encodes many texts at once."""

    @property
    def name(self) -> str:
        """Package and version."""
        ...

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of every text, on one thread."""
        ...


class Choice(NamedTuple):
    """Which encoder to use."""

    fast: bool
    """Whether the fast one was found equal."""
    name: str
    """Package and version of the one to use."""
    reason: str
    """Why the fast one is not used where the tokenizer has one, or an empty string."""


class ReferenceEncoder:
    """The tokenizer itself, its lists turned into one array."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Encode with ``tokenizer``."""
        self.name = tokenizer.library
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of every text, on one thread."""
        parts = [np.zeros(0, np.uint32)]
        for start in range(0, len(texts), _LISTS):
            encoded = self._tokenizer.encode_batch(texts[start : start + _LISTS])
            parts += [np.asarray(ids, dtype=np.uint32) for ids in encoded]
        offsets = np.cumsum([len(part) for part in parts], dtype=np.int64)
        return TokenBatch(np.concatenate(parts), offsets)


class FastEncoder:
    """fastokens with the content of the same tokenizer."""

    def __init__(self, tokenizer: JsonTokenizer | RanksTokenizer) -> None:
        """Load the tokenizer's file a second time.

        Raises:
            DataError: fastokens is missing or does not know this kind of tokenizer.
        """
        # The package reads it once, when its threads start; a worker has one core.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # noqa: TID251
        try:
            package: Any = importlib.import_module("fastokens")
        except ModuleNotFoundError:
            raise DataError(f"fastokens is not installed: {INSTALL}") from None
        try:
            if isinstance(tokenizer, JsonTokenizer):
                self._encoder: Any = package.Tokenizer.from_json_str(
                    tokenizer.path.read_text(encoding="utf-8")
                )
            else:
                self._encoder = package.Tokenizer.from_tiktoken(
                    str(tokenizer.path), pattern=tokenizer.pattern,
                    special_tokens=tokenizer.special_tokens,
                )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise DataError(f"fastokens cannot load {tokenizer.path} ({error})") from None
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self.name = f"fastokens {version('fastokens')}"

    def encode(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of every text, on one thread."""
        try:
            ids, offsets = self._encoder.encode_batch_flat(list(texts), False, True)
        except (UnicodeEncodeError, TypeError) as error:
            raise no_utf8(error) from None
        return TokenBatch(
            np.frombuffer(ids, np.dtype("<u4")),
            np.frombuffer(offsets, np.dtype("<u8")).astype(np.int64),
        )


def make_encoder(tokenizer: Tokenizer, *, fast: bool) -> Encoder:
    """Return the fast encoder of a tokenizer, or the tokenizer as an encoder.

    Raises:
        DataError: there is no fast one here.
    """
    if not fast:
        return ReferenceEncoder(tokenizer)
    if not isinstance(tokenizer, JsonTokenizer | RanksTokenizer):
        raise DataError(f"fastokens does not encode {tokenizer.library.split()[0]} models")
    return FastEncoder(tokenizer)


def choose_encoder(
    tokenizer: Tokenizer, sample: Sequence[str], memory_bytes: int | None = None
) -> Choice:
    """Compare the fast encoder with the tokenizer on ``PROBES`` and ``sample``; choose.

    ``memory_bytes`` is what a worker may use; the fast encoder may take half of it.
    """
    slow = Choice(False, tokenizer.library, "")
    if not isinstance(tokenizer, JsonTokenizer | RanksTokenizer):
        return slow
    needed = BASE_BYTES + BYTES_PER_TOKEN * tokenizer.vocab_size
    if memory_bytes is not None and 2 * needed > memory_bytes:
        return slow._replace(
            reason=f"fastokens takes about {needed / 1e6:.0f} MB in every worker, more than "
            f"half of memory_gib={memory_bytes / 2**30:.3g}"
        )
    try:
        fast = FastEncoder(tokenizer)
    except DataError as error:
        return slow._replace(reason=str(error))
    texts = [*PROBES, *sample]
    expected, found = ReferenceEncoder(tokenizer).encode(texts), fast.encode(texts)
    for i, text in enumerate(texts):
        ours, theirs = (batch.ids[batch.offsets[i] : batch.offsets[i + 1]]
                        for batch in (found, expected))  # fmt: skip
        if not np.array_equal(ours, theirs):
            return slow._replace(
                reason=f"{fast.name} gives other ids than {tokenizer.library} for text {i + 1} of "
                f"{len(texts)} compared, which begins {text[:40]!r}"
            )
    return Choice(True, fast.name, "")
