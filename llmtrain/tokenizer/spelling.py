r"""What every id of a tokenizer spells, in bytes, whatever kind of tokenizer it is.

Tokens of two vocabularies are the same token where they spell the same bytes, or are special tokens
of one name; their ids and the symbols a file writes them with say nothing.

    spelling = spelling_of("tokenizer")
    spelling[262]       # b" the", a str for a special token, None for an id that nothing has
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError
from llmtrain.tokenizer.byte_level import JsonTokenizer
from llmtrain.tokenizer.files import RANKS_SUFFIX
from llmtrain.tokenizer.ranks import RanksTokenizer
from llmtrain.tokenizer.sentence_piece import SPACE_SYMBOL
from llmtrain.tokenizer.tokenizer import find

Spelling = Sequence[bytes | str | None]
"""By id: bytes of a piece of text, name of a special token, None of an id without a token."""
_BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def spelling_of(path: Path | str) -> Spelling:
    """List what the ids of the tokenizer at ``path`` spell.

    Raises:
        DataError: there is no tokenizer, or it is damaged.
    """
    found = find(Path(path))
    if found is None:
        raise DataError(f"{path} holds no tokenizer; give a tokenizer folder or its file")
    if found.suffix == ".json":
        return _of_json(found)
    return _of_ranks(found) if found.suffix == RANKS_SUFFIX else _of_pieces(found)


def _of_pieces(path: Path) -> Spelling:
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, TypeError):
        raise DataError(f"{path} is not a SentencePiece model; copy it again") from None
    ids = range(processor.vocab_size())
    return [
        str(processor.id_to_piece(i)) if processor.is_control(i) or processor.is_unknown(i)
        else _of_piece(str(processor.id_to_piece(i)))
        for i in ids
    ]  # fmt: skip


def _of_piece(piece: str) -> bytes:
    """Bytes of a piece with SentencePiece's symbol for the space, or of a byte piece."""
    return _BYTE_PIECES.get(piece) or piece.replace(SPACE_SYMBOL, " ").encode()


def _of_ranks(path: Path) -> Spelling:
    tokenizer = RanksTokenizer(path)
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return [names.get(i) or _of_rank(tokenizer, i) for i in range(tokenizer.vocab_size)]


def _of_rank(tokenizer: RanksTokenizer, token: int) -> bytes | None:
    try:
        return tokenizer.bytes_of(token)
    except KeyError:
        return None


def _of_json(path: Path) -> Spelling:
    """Read the vocabulary of a ``tokenizer.json``: in bytes or in pieces, as its decoder says."""
    found: list[bytes | str | None] = [None] * JsonTokenizer(path).vocab_size
    content = json.loads(path.read_text(encoding="utf-8"))
    in_bytes = '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    symbols = _symbols() if in_bytes else {}
    vocabulary = content["model"]["vocab"]
    pieces = vocabulary if isinstance(vocabulary, dict) else {
        entry[0]: i for i, entry in enumerate(vocabulary)
    }  # fmt: skip
    for piece, i in pieces.items():
        if in_bytes and all(symbol in symbols for symbol in piece):
            found[i] = bytes(symbols[symbol] for symbol in piece)
        else:
            found[i] = _of_piece(piece)
    for token in content.get("added_tokens", []):
        name = str(token["content"])
        found[token["id"]] = name if token.get("special") else name.encode()
    return found


def _symbols() -> dict[str, int]:
    """Byte by the character that byte-level BPE writes it with (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + i): byte for i, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
