"""A small tiktoken rank file: the 256 bytes and a few merges."""

import base64
import json
from pathlib import Path

MERGES = ["th", "the", " t", " the", "12", "123", "  ", "ke", "en", "ken", "\n\n", "em", "eme"]
SPECIAL = {"<|endoftext|>": 256 + len(MERGES), "<|im_start|>": 300}


def write_ranks(folder: Path, pattern: str = "gpt4") -> None:
    """Write ``small.tiktoken`` and ``small.json``."""
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in MERGES]
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    (folder / "small.tiktoken").write_text("".join(lines))
    description = {"pattern": pattern, "special_tokens": SPECIAL, "eos_token": "<|endoftext|>"}
    (folder / "small.json").write_text(json.dumps(description))
