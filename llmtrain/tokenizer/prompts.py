"""Prompts as transformers reads them: names of special tokens in a text are these tokens.

In the text of a corpus a name such as ``</s>`` is text, and ``Tokenizer.encode`` spells it out. In
a prompt, above all in one that a chat template wrote, it is the token; and some tokenizers put a
token in front of every text. Both are here.

    prompts = PromptEncoder("tokenizer")
    ids = prompts.encode(prompts.chat([{"role": "user", "content": "Hello"}]), prefix=False)
    prompts.decode(ids)
"""

import importlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.errors import DataError
from llmtrain.tokenizer import tokenizer as tokenizers
from llmtrain.tokenizer.byte_level import JsonTokenizer
from llmtrain.tokenizer.chat import Message, render, required_template
from llmtrain.tokenizer.files import CONFIG_FILE, META_FILE, read_object
from llmtrain.tokenizer.ranks import RanksTokenizer
from llmtrain.tokenizer.sentence_piece import SPACE_SYMBOL

Int64Array = npt.NDArray[np.int64]

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class PromptEncoder:
    """A tokenizer for prompts and conversations."""

    def __init__(self, path: Path | str) -> None:
        """Load the tokenizer at ``path``.

        Raises:
            DataError: nothing to load there, or it is damaged.
        """
        self.tokenizer = tokenizers.load(path)
        found = tokenizers.find(Path(path))
        self.file = Path(path) if found is None else found
        self.folder = self.file.parent
        config = self.folder / CONFIG_FILE
        self._config = read_object(config) if config.is_file() else {}
        self._whole: Any = None
        self.special = self._special()
        self.names = {**self._own_names(), **self._configured_names()}
        """Spelling of special tokens by the name templates know."""
        self.control = self._control()
        """Spelling of the special tokens that are no text, as ``</think>`` of Qwen3 is."""
        self.bos_id = self.special.get(self.names.get("bos_token", ""))
        self.prefix = self._prefix()
        """Ids the tokenizer puts in front of every text."""

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """Return the ids of ``text``, its special tokens included; ``prefix`` ids before them."""
        start = self.prefix if prefix else []
        if self._whole is not None:
            return start + list(self._whole.encode(text, add_special_tokens=False).ids)
        if not self.special:
            return start + self.tokenizer.encode(text)
        ids = list(start)
        for part in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self.tokenizer.encode(part)
        return ids

    def encode_with_spans(
        self, text: str, *, prefix: bool = True
    ) -> tuple[list[int], Int64Array, Int64Array]:
        """Return what ``encode`` does, and the characters [start, end) each id stands for.

        Ids of one character that takes several have all of it, ids of ``prefix`` have none.

        Raises:
            DataError: the tokenizer changes the text, so that its ids stand for other characters.
        """
        front = self.prefix if prefix else []
        if self._whole is not None:
            found = self._whole.encode(text, add_special_tokens=False)
            offsets = np.array(found.offsets, dtype=np.int64).reshape(-1, 2)
            ids, ends = list(found.ids), offsets[:, 1]
            # the space in front of a word is cut off the offsets of some tokenizers
            starts = np.minimum(offsets[:, 0], np.append(0, ends)[:-1])
        else:
            ids = self.encode(text, prefix=False)
            starts, ends = self._spans_by_bytes(ids, text)
        none = np.zeros(len(front), dtype=np.int64)
        return front + ids, np.concatenate([none, starts]), np.concatenate([none, ends])

    def _spans_by_bytes(self, ids: Sequence[int], text: str) -> tuple[Int64Array, Int64Array]:
        """Add up the bytes of every id; they have to be those of the text."""
        spelled = [self._bytes_of(i) for i in ids]
        if b"".join(spelled) == b" " + text.encode() and spelled[0][:1] == b" ":
            spelled[0] = spelled[0][1:]  # put in front of the first word
        if b"".join(spelled) != text.encode():
            raise DataError(
                f"the tokenizer in {self.folder} changes texts (its ids spell "
                f"{b''.join(spelled)[:60]!r}), so its tokens cannot be told apart by characters; "
                "use its tokenizer.json"
            )
        of_byte = np.repeat(np.arange(len(text)), [len(c.encode()) for c in text])
        ends = np.cumsum([len(part) for part in spelled])
        firsts = ends - [len(part) for part in spelled]
        behind = np.append(of_byte, len(text))
        return behind[firsts], np.where(ends > firsts, of_byte[ends - 1] + 1, behind[firsts])

    def _bytes_of(self, token: int) -> bytes:
        """The bytes an id spells: those of its name where it is special."""
        if token in self._spelling:
            return self._spelling[token].encode()
        if isinstance(self.tokenizer, RanksTokenizer):
            return self.tokenizer.bytes_of(token)
        piece = str(self._processor.id_to_piece(token))
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_SYMBOL, " ").encode()

    @cached_property
    def _spelling(self) -> dict[int, str]:
        return {i: name for name, i in self.special.items()}

    @cached_property
    def _processor(self) -> Any:
        return self._pieces()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; special ids give nothing."""
        special = set() if self._whole is not None else set(self.special.values())
        return self.tokenizer.decode([i for i in ids if i not in special])

    def name_of(self, token: int) -> str:
        """Return the spelling of a special token, or the text of another."""
        return self._spelling.get(token) or self.tokenizer.decode([token])

    def chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Lay a conversation out as the prompt of its next message.

        Raises:
            DataError: the tokenizer has no chat template, or its template refuses the messages.
        """
        return render(
            required_template(self.folder), messages, self.names,
            add_generation_prompt=add_generation_prompt,
        )  # fmt: skip

    def _special(self) -> dict[str, int]:
        """Ids of special tokens by their spelling."""
        if isinstance(self.tokenizer, JsonTokenizer):
            self._whole = importlib.import_module("tokenizers").Tokenizer.from_file(str(self.file))
            self._whole.no_truncation()
            self._whole.no_padding()
            added = self._whole.get_added_tokens_decoder()
            return {token.content: i for i, token in added.items()}
        if isinstance(self.tokenizer, RanksTokenizer):
            return dict(self.tokenizer.special_tokens)
        pieces = self._pieces()
        ids = range(self.tokenizer.vocab_size)
        return {
            str(pieces.id_to_piece(i)): i
            for i in ids
            if pieces.is_control(i) or pieces.is_unknown(i)
        }

    def _control(self) -> frozenset[str]:
        """Names of the special tokens, less those that ``tokenizer.json`` says are words."""
        if self._whole is None:
            return frozenset(self.special)
        added = self._whole.get_added_tokens_decoder().values()
        named = {self.names.get("eos_token", "")} - {""}
        return frozenset(named | {token.content for token in added if token.special})

    def _pieces(self) -> Any:
        import sentencepiece

        pieces: Any = sentencepiece.SentencePieceProcessor()
        pieces.LoadFromSerializedProto(self.file.read_bytes())
        return pieces

    def _own_names(self) -> dict[str, str]:
        """What the tokenizer itself says of its special tokens."""
        spelled = {i: name for name, i in self.special.items()}
        names = {"eos_token": spelled.get(self.tokenizer.eos_id, "")}
        if not isinstance(self.tokenizer, JsonTokenizer | RanksTokenizer):
            bos = int(self._pieces().bos_id())
            names |= {"bos_token": spelled[bos]} if bos >= 0 else {}
        return names

    def _configured_names(self) -> dict[str, str]:
        """What ``tokenizer_config.json`` says of them."""
        named = {key: self._config.get(key) for key in _NAMES}
        return {
            key: str(value["content"] if isinstance(value, dict) else value)
            for key, value in named.items()
            if value
        }

    def _prefix(self) -> list[int]:
        if self._whole is not None:
            plain = self._whole.encode("a", add_special_tokens=False).ids
            framed = self._whole.encode("a", add_special_tokens=True).ids
            return list(
                framed[: next(i for i in range(len(framed)) if framed[i:][: len(plain)] == plain)]
            )
        foreign = not (self.folder / META_FILE).is_file() and self.bos_id is not None
        wanted = self._config.get("add_bos_token", foreign)
        return [self.bos_id] if wanted and self.bos_id is not None else []
