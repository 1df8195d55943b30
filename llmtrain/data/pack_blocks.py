"""Pack blocks: the runs of documents that are packed together, and how many windows each gives.

A block is a run of whole documents of one shard, about 4 M tokens: the documents that begin between
two edges, and the edges are arithmetic on the size of the shard. So a block is found, and packed,
from the index alone. The windows of every block are counted once and kept in a file beside the
store, ``pack-00004096.json`` for windows of 4,096 tokens, which names the store it was counted for.

    counts = count_blocks(store, 4096, 0, PackBlocks(store, 4096).num_blocks)
    write_packing(store, packing_of(store, 4096, [counts]))    # what `llmtrain-data pack` does
    read_packing(store, "wiki", 4096).num_windows
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import blake3
import numpy as np

from llmtrain.data.best_fit import PackedRows, pack_documents
from llmtrain.data.indexed import Int64Array
from llmtrain.data.manifest import sync
from llmtrain.data.store import TokenStore
from llmtrain.errors import DataError

BLOCK_TOKENS = 1 << 22
"""Tokens of a block, about; what is packed together, and what a window's documents are near to."""
BLOCK_WINDOWS = 256
"""Windows of a block at least: its last one is half empty on average."""
VERSION = 1
"""Changes with the bounds of blocks and with the algorithm."""


class PackBlocks:
    """The blocks of a store for one window length."""

    def __init__(self, store: TokenStore, window_tokens: int) -> None:
        """Cut every shard of ``store`` into equal parts of about BLOCK_TOKENS."""
        self.store = store
        self.window_tokens = window_tokens
        self.block_tokens = max(BLOCK_TOKENS, BLOCK_WINDOWS * window_tokens)
        per_shard = np.maximum(1, np.diff(store.shard_starts) // self.block_tokens)
        self._first_block: Int64Array = np.cumsum([0, *per_shard])
        self.num_blocks = int(self._first_block[-1])

    def documents(self, block: int) -> tuple[int, Int64Array]:
        """Return the first token of a block in the store, and the lengths of its documents."""
        number = int(np.searchsorted(self._first_block, block, side="right")) - 1
        shard, shard_start = self.store.shards[number], int(self.store.shard_starts[number])
        place = block - int(self._first_block[number])
        edges = self._edges(number)[place : place + 2]
        low, high = shard.first_document_from(edges).tolist()
        starts = shard.document_starts(np.arange(low, high + 1))
        return shard_start + int(starts[0]), np.diff(starts)

    def pack(self, block: int) -> tuple[int, PackedRows]:
        """Return the first token of a block in the store, and its documents in windows."""
        start, lengths = self.documents(block)
        return start, pack_documents(lengths, self.window_tokens)

    def block_of(self, token: int) -> int:
        """Return the block whose documents hold a token of the store."""
        start, _ = self.store.document_span(self.store.document_at(token))
        number = int(np.searchsorted(self.store.shard_starts, start, side="right")) - 1
        local = start - int(self.store.shard_starts[number])
        place = int(np.searchsorted(self._edges(number), local, side="right")) - 1
        return int(self._first_block[number]) + place

    def _edges(self, number: int) -> Int64Array:
        """Where the blocks of a shard would begin if documents did not matter, and its end."""
        first, after = self._first_block[number : number + 2].tolist()
        start, end = self.store.shard_starts[number : number + 2].tolist()
        edges: Int64Array = np.arange(after - first + 1) * (end - start) // (after - first)
        return edges


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How a store packs into windows of one length; the content of ``pack-*.json``."""

    store: str
    """Fingerprint of the store."""
    window_tokens: int
    """Tokens of a window."""
    num_tokens: int
    """Tokens of the store; every one is an input of one window."""
    num_documents: int
    """Documents of the store."""
    cut_documents: int
    """Documents longer than a window, which had to be cut."""
    cut_documents_concat: int
    """Documents that windows at equal distances would cut."""
    windows: tuple[int, ...]
    """Windows of every block, in order."""
    version: int = VERSION
    """Version of the packing."""
    hash: str = ""
    """blake3 of the fields above."""

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return sum(self.windows)

    @property
    def padding(self) -> float:
        """Share of the inputs that hold no token."""
        return 1 - self.num_tokens / (self.num_windows * self.window_tokens)

    def computed_hash(self) -> str:
        """Return what ``hash`` has to be."""
        text = json.dumps(asdict(replace(self, hash="")), sort_keys=True)
        return str(blake3.blake3(text.encode()).hexdigest())


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """What packing a run of blocks counted."""

    windows: tuple[int, ...]
    """Windows of every block."""
    cut_documents: int
    """Documents longer than a window."""
    cut_documents_concat: int
    """Documents that windows at equal distances would cut."""


def count_blocks(store: TokenStore, window_tokens: int, first: int, end: int) -> BlockCounts:
    """Pack the blocks [first, end) of a store and count their windows."""
    blocks = PackBlocks(store, window_tokens)
    windows, cut, cut_concat = [], 0, 0
    for block in range(first, end):
        start, lengths = blocks.documents(block)
        windows.append(pack_documents(lengths, window_tokens).num_rows)
        cut += int((lengths > window_tokens).sum())
        ends = start + np.cumsum(lengths)
        cut_concat += int(((ends - lengths) // window_tokens != (ends - 1) // window_tokens).sum())
    return BlockCounts(tuple(windows), cut, cut_concat)


def packing_of(store: TokenStore, window_tokens: int, parts: Sequence[BlockCounts]) -> Packing:
    """Put together what was counted over all blocks of a store, in order."""
    packing = Packing(
        store=store.fingerprint,
        window_tokens=window_tokens,
        num_tokens=store.num_tokens,
        num_documents=store.num_documents,
        cut_documents=sum(part.cut_documents for part in parts),
        cut_documents_concat=sum(part.cut_documents_concat for part in parts),
        windows=tuple(count for part in parts for count in part.windows),
    )
    return replace(packing, hash=packing.computed_hash())


def pack_name(store: TokenStore, window_tokens: int) -> str:
    """Return the name of the file of a packing in the folder of its store."""
    name = f"pack-{window_tokens:08d}.json"
    if store.manifest is not None:
        return name
    return f"{store.shards[0].name.rpartition('/')[2]}.{name}"


def write_packing(store: TokenStore, packing: Packing) -> Path:
    """Write a packing aside and rename it; returns its path.

    Raises:
        DataError: the store is not on this machine.
    """
    folder = store.folder_of(0)
    if folder.is_remote:
        raise DataError(
            f"{store.name} is on object storage; pack it where it was written, "
            f"then copy {pack_name(store, packing.window_tokens)} beside its other files"
        )
    path = Path(folder.name) / pack_name(store, packing.window_tokens)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.write_text(json.dumps(asdict(packing)) + "\n")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)
    return path


def read_packing(store: TokenStore, source: str, window_tokens: int) -> Packing:
    """Read the packing of the one store of a source and check that it is this store's.

    Raises:
        DataError: there is none, or it is damaged, of another store or another version.
    """
    folder, name = store.folder_of(0), pack_name(store, window_tokens)
    path = f"{folder.name}/{name}"
    command = (
        f"run `llmtrain-data pack store={store.name} sequence_length={window_tokens}` "
        "or set data.packing=concat"
    )
    try:
        plain = json.loads(folder.content(name))
        packing = Packing(**{**plain, "windows": tuple(plain["windows"])})
    except FileNotFoundError:
        raise DataError(
            f"source {source} is not packed for training.sequence_length={window_tokens}: there "
            f"is no {path}; {command}"
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is no packing of version {VERSION} ({error}); {command}") from None
    if packing.hash != packing.computed_hash():
        raise DataError(f"{path} was changed after it was written; {command}")
    expected = (store.fingerprint, VERSION, window_tokens)
    if (packing.store, packing.version, packing.window_tokens) != expected:
        raise DataError(
            f"{path} is the packing of store {packing.store[:16]} in windows of "
            f"{packing.window_tokens} tokens (version {packing.version}), expected store "
            f"{store.fingerprint[:16]}, {window_tokens} tokens, version {VERSION}; {command}"
        )
    return packing
