"""The manifest of a token store: which shards it has, what made them, and their digests.

It is written last and renamed into place, so a folder without a manifest is unfinished. Its own
``hash`` covers every field but the notes; start-up checks it, and a batch plan's fingerprint uses
it.

    read_manifest(Path("stores/wiki")).num_tokens
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import blake3

from llmtrain.data.files import Folder, LocalFolder
from llmtrain.data.indexed import token_dtype
from llmtrain.data.roles import ENDING
from llmtrain.errors import DataError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What the manifest says of one shard; plain values, so that workers can send it."""

    name: str
    """``part-00000``."""
    num_tokens: int
    """Tokens, EOS included."""
    num_documents: int
    """Documents; 0 means that no file was written."""
    sizes: dict[str, int]
    """Bytes by file ending (``bin``, ``idx``, ``docs.parquet``, and ``roles`` where it has any)."""
    sha256: dict[str, str]
    """Digest by file ending."""
    ends: dict[str, str] = field(default_factory=dict)
    """``ends_digest`` of ``bin``, ``idx`` and ``roles``, compared before a shard is first read;
    empty in stores written before there was one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``; ``hash`` covers everything else in it."""

    tokenizer_hash: str
    """blake3 of the tokenizer's bytes."""
    vocab_size: int
    """Vocabulary of that tokenizer."""
    eos_id: int
    """The id that ends every document."""
    pipeline_hash: str
    """Hash of what made the text, or an empty string."""
    dtype: str
    """``uint16`` or ``int32``."""
    num_tokens: int
    """Tokens of all shards."""
    num_documents: int
    """Documents of all shards."""
    shards: tuple[ShardInfo, ...]
    """Shards in reading order."""
    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    hash: str = ""
    """blake3 of the canonical JSON of the fields above."""
    notes: dict[str, Any] = field(default_factory=dict)
    """How the store came to be (source, encoder, order, bytes of text), where its writer says it.
    Not part of ``hash``: equal tokens are the same data, whichever encoder made them."""

    @property
    def has_roles(self) -> bool:
        """Whether its tokens have roles (``llmtrain.data.roles``)."""
        return ENDING in self.shards[0].sizes

    def computed_hash(self) -> str:
        """Return what ``hash`` has to be."""
        plain = self.to_plain() | {"hash": ""}
        del plain["notes"]
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        return str(blake3.blake3(text.encode()).hexdigest())

    def to_plain(self) -> dict[str, Any]:
        """Return what the file holds; nothing is copied, 10,000 shards take milliseconds."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        plain["shards"] = [_shard_to_plain(shard) for shard in self.shards]
        return plain


def _shard_to_plain(shard: ShardInfo) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": shard.name, "num_tokens": shard.num_tokens, "num_documents": shard.num_documents,
        "sizes": shard.sizes, "sha256": shard.sha256,
    }  # fmt: skip
    return plain | {"ends": shard.ends} if shard.ends else plain


def write_manifest(
    directory: Path | str,
    shards: Sequence[ShardInfo],
    *,
    tokenizer_hash: str,
    vocab_size: int,
    eos_id: int,
    pipeline_hash: str = "",
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Finish a store: write ``manifest.json`` aside and rename it; empty shards are left out.

    ``notes`` are JSON-able; they are kept and change no fingerprint.

    Raises:
        DataError: no shard holds a document, or some have roles and others not.
    """
    kept = tuple(sorted((s for s in shards if s.num_documents), key=lambda shard: shard.name))
    if not kept:
        raise DataError(f"the store {directory} would be empty: none of its documents survived")
    without = [shard.name for shard in kept if ENDING not in shard.sizes]
    if without and len(without) < len(kept):
        raise DataError(
            f"{directory}/{without[0]} has no roles and other shards of the store have; write all "
            "shards with roles or none"
        )
    manifest = Manifest(
        tokenizer_hash=tokenizer_hash,
        vocab_size=vocab_size,
        eos_id=eos_id,
        pipeline_hash=pipeline_hash,
        dtype=token_dtype(vocab_size).newbyteorder("=").name,
        num_tokens=sum(shard.num_tokens for shard in kept),
        num_documents=sum(shard.num_documents for shard in kept),
        shards=kept,
        notes=dict(notes or {}),
    )
    manifest = replace(manifest, hash=manifest.computed_hash())
    path = Path(directory) / MANIFEST
    temporary = path.with_name(f"{MANIFEST}.{secrets.token_hex(6)}.tmp")
    temporary.write_text(json.dumps(manifest.to_plain(), indent=1, sort_keys=True) + "\n")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read ``manifest.json`` of a folder of this machine and check its hash.

    Raises:
        DataError: it is missing, unreadable, of a later version or changed since it was written.
    """
    return manifest_of(LocalFolder(directory))


def manifest_of(folder: Folder) -> Manifest:
    """Read ``manifest.json`` of a folder and check its hash.

    Raises:
        DataError: it is missing, unreadable, of a later version or changed since it was written.
    """
    path = f"{folder.name}/{MANIFEST}"
    try:
        plain: dict[str, Any] = json.loads(folder.content(MANIFEST))
        shards = tuple(ShardInfo(**shard) for shard in plain.pop("shards"))
        manifest = Manifest(shards=shards, **plain)
    except FileNotFoundError:
        raise DataError(
            f"{folder.name} has no {MANIFEST}; the store is unfinished or no store: run the "
            "command that writes it again, it continues where it stopped"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} is not a manifest of format version {FORMAT_VERSION} ({error}); write it again"
        ) from None
    if manifest.hash != manifest.computed_hash():
        raise DataError(
            f"{path} was changed after it was written (its hash is "
            f"{manifest.computed_hash()[:16]}, it says {manifest.hash[:16]}); restore it "
            "or write the store again"
        )
    return manifest


def file_sha256(path: Path) -> str:
    """Return the sha256 hex of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or the entries of a folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
