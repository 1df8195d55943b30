"""What a tokenizer's folder holds, and how one is written.

A folder is one of three kinds: ``tokenizer.model`` (SentencePiece), ``tokenizer.json`` (Hugging
Face) or ``NAME.tiktoken`` with ``NAME.json`` (tiktoken ranks). One trained here also has
``llmtrain_tokenizer.json``, written last: settings, sample and the hash that ``load`` compares.

    write_trained(Path("tokenizer"), {"tokenizer.model": model}, {"hash": ...})
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blake3

from llmtrain.errors import DataError

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
RANKS_SUFFIX = ".tiktoken"
META_FILE = "llmtrain_tokenizer.json"


def content_hash(content: bytes) -> str:
    """blake3 hex of the bytes that define a tokenizer; token stores keep it."""
    return str(blake3.blake3(content).hexdigest())


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: it holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object; copy it again")
    return found


def write_trained(folder: Path, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
    """Write the files of a trained tokenizer, each whole or not at all, and the meta file last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META_FILE).unlink(missing_ok=True)
    for name, content in files.items():
        _write_aside(folder / name, content)
    _write_aside(folder / META_FILE, (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())


def _write_aside(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
