"""Tokenizer folders in and out: the files are copied as they are, with their chat template.

A SentencePiece model trained here also goes out as a ``tokenizer.json``, which is what transformers
reads; the ids are the same (but for U+2581, which SentencePiece keeps for the space and we spell in
bytes). A ``tokenizer.json`` that comes in beside a ``tokenizer.model`` is the one that is used: it
knows the tokens that were added later.

    path = bring_in(Path("llama"), Path("runs/llama/tokenizer"))
    take_out(path, Path("llama-hf"), chat_template=None)
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.tokenizer import tokenizer as tokenizers
from llmtrain.tokenizer.files import (
    CONFIG_FILE,
    JSON_FILE,
    META_FILE,
    MODEL_FILE,
    RANKS_SUFFIX,
    read_object,
)
from llmtrain.tokenizer.sentence_piece import BOS_ID, EOS_ID, SPACE_SYMBOL, UNK_ID

logger = logging.getLogger(__name__)

TEMPLATE_FILE = "chat_template.jinja"
FILES = (
    MODEL_FILE, JSON_FILE, CONFIG_FILE, "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", TEMPLATE_FILE, "chat_template.json", META_FILE,
)  # fmt: skip
"""What of a folder belongs to its tokenizer."""


def bring_in(source: Path, to: Path) -> Path | None:
    """Copy the tokenizer of a Hugging Face folder; returns what ``tokenizer.path`` should be.

    None where the folder has none. Raises DataError where it cannot be used.
    """
    if tokenizer_in(source) is None:
        return None
    to.mkdir(parents=True)
    _copy(source, to)
    path = tokenizer_in(to) or to
    tokenizers.load(path)
    return path


def tokenizer_in(folder: Path) -> Path | None:
    """Return what of a Hugging Face folder is its tokenizer: the folder, or its tokenizer.json."""
    if tokenizers.find(folder) is None:
        return None
    if (folder / JSON_FILE).is_file() and not (folder / META_FILE).is_file():
        return folder / JSON_FILE
    return folder


def take_out(path: str, to: Path, chat_template: str | None) -> dict[str, int]:
    """Put the tokenizer at ``path`` into a Hugging Face folder; returns its special ids by name.

    Raises:
        DataError: it is damaged or was changed.
        ConfigError: there is no such template, or transformers reads no such tokenizer.
    """
    tokenizer, found = tokenizers.load(path), tokenizers.find(Path(path))
    folder = Path(path) if found is None else found.parent
    if found is not None and found.suffix == RANKS_SUFFIX:
        raise ConfigError(
            f"tokenizer.path={path} holds tiktoken ranks, which transformers does not read; put a "
            f"{JSON_FILE} in their place"
        )
    _copy(folder, to)
    ids = {"eos_token_id": tokenizer.eos_id}
    ours = (folder / MODEL_FILE).is_file() and (folder / META_FILE).is_file()
    if ours:
        ids["bos_token_id"] = BOS_ID
    if ours and not (folder / JSON_FILE).is_file():
        _write(to / JSON_FILE, json_of(folder / MODEL_FILE))
        _write(to / CONFIG_FILE, _SENTENCEPIECE_CONFIG)
    if chat_template is not None:
        _put_template(Path(chat_template), to)
    return ids


def _copy(source: Path, to: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, to / name)


def _put_template(template: Path, to: Path) -> None:
    """Replace the chat template, wherever the tokenizer had one."""
    if not template.is_file():
        raise ConfigError(f"chat_template={template} is no file; give a Jinja template")
    shutil.copyfile(template, to / TEMPLATE_FILE)
    (to / "chat_template.json").unlink(missing_ok=True)
    config = to / CONFIG_FILE
    if config.is_file() and "chat_template" in (fields := read_object(config)):
        _write(config, {k: v for k, v in fields.items() if k != "chat_template"})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


_SENTENCEPIECE_CONFIG: Mapping[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
    "eos_token": "</s>", "clean_up_tokenization_spaces": False,
}  # fmt: skip


def json_of(model: Path) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of a SentencePiece model trained here."""
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.read_bytes())
    ids = range(processor.vocab_size())
    pieces = [str(processor.id_to_piece(i)) for i in ids]
    plain = [
        i for i in ids
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]  # fmt: skip
    settings = read_object(model.with_name(META_FILE))["settings"]
    if settings["model_type"] == "bpe":
        vocabulary = _bpe(pieces, plain)
    else:
        scores = [float(processor.get_score(i)) for i in ids]
        vocabulary = {
            "type": "Unigram", "unk_id": UNK_ID, "byte_fallback": True,
            "vocab": [list(pair) for pair in zip(pieces, scores, strict=True)],
        }  # fmt: skip
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL}
    back = {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], **special, "special": True}
            for i in (UNK_ID, BOS_ID, EOS_ID)
        ],
        "normalizer": spaces, "pre_tokenizer": None, "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": vocabulary,
    }  # fmt: skip


def _bpe(pieces: list[str], plain: list[int]) -> dict[str, Any]:
    """Spell out the merges that SentencePiece leaves implied: any two pieces that make a third.

    A pair is merged the earlier the lower the id of what it makes.
    """
    id_of = {pieces[i]: i for i in plain}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in sorted(id_of, key=id_of.__getitem__)
        for cut in sorted(
            (n for n in range(1, len(piece)) if piece[:n] in id_of and piece[n:] in id_of),
            key=lambda n: (id_of[piece[:n]], id_of[piece[n:]]),
        )
    ]
    return {
        "type": "BPE", "dropout": None, "unk_token": pieces[UNK_ID],
        "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
        "byte_fallback": True, "ignore_merges": False,
        "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges,
    }  # fmt: skip
