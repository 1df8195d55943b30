"""A small tokenizer with the special tokens of chat templates, and the shipped examples."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llmtrain.tokenizer.files import META_FILE
from llmtrain.tokenizer.tokenizer import train

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
CHATS, PAIRS = EXAMPLES / "chats.jsonl", EXAMPLES / "pairs.jsonl"
TEMPLATE = EXAMPLES / "chat_template.jinja"
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>"]


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of examples."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def chat_tokenizer(folder: Path, template: str | None = None) -> Path:
    """Byte-level BPE of 400 tokens and ``SPECIAL``; EOS is ``<|endoftext|>``."""
    train(CHATS.read_text().splitlines(), folder, kind="byte_bpe", vocab_size=400)
    (folder / META_FILE).unlink()
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(path))
    config = folder / "tokenizer_config.json"
    named = {"bos_token": "<s>", "pad_token": "<|end|>"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
