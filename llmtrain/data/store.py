"""A token store: a folder of Megatron shards with the origin of every document and a manifest.

``DIR/part-00000.{bin,idx,docs.parquet}`` ... and ``DIR/manifest.json``, written last: a folder
without a manifest is unfinished and is not read. Where not every token is a target there is a
``part-00000.roles`` as well (``llmtrain.data.roles``). A path prefix (``DIR/NAME`` for
``DIR/NAME.bin`` and ``DIR/NAME.idx``), or a folder that holds exactly one such pair, is a store of
another program and opens too. Any number of processes may write shards; one writes the manifest.

    with ShardWriter(folder, 0, vocab_size=32_000, eos_id=2) as writer:
        writer.add([5, 6, 7], DocumentRecord(id="..."))
    write_manifest(folder, [writer.info], tokenizer_hash=..., vocab_size=32_000, eos_id=2)
    TokenStore.open("stores/wiki").tokens(0, 4)
    open_source(["stores/wiki", "stores/more"]).num_tokens
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import blake3
import numpy as np

from llmtrain.data.files import Folder
from llmtrain.data.indexed import Int64Array, TokenArray
from llmtrain.data.lineage import DocumentRecord, read_counts, read_record, read_selected
from llmtrain.data.location import check_files, foreign_fingerprint, foreign_shard, locate
from llmtrain.data.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    file_sha256,
    manifest_of,
    read_manifest,
    write_manifest,
)
from llmtrain.data.roles import RoleArray, check_roles
from llmtrain.data.shards import Shards
from llmtrain.data.writer import ShardWriter
from llmtrain.errors import DataError

__all__ = [
    "MANIFEST",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "TokenStore",
    "open_source",
    "read_manifest",
    "verify",
    "write_manifest",
]

MAX_KNOWN_STARTS, MAX_KNOWN_SHARDS = 1 << 21, 256
"""Stores with more documents or shards keep no list of where documents start (8 bytes each): they
bisect the index of the shard."""
SHARDS_COMPARED = 64
"""Shards whose ends are compared with the manifest before a run begins: milliseconds."""
DOCUMENTS_PER_WINDOW = 128
"""The list is made once a window was asked for per so many documents: a run begins without it."""


class TokenStore:
    """Random access to the tokens and the document boundaries of one source."""

    def __init__(
        self,
        name: str,
        shards: Shards,
        manifest: Manifest | None,
        fingerprint: str,
    ) -> None:
        """Use ``TokenStore.open`` or ``open_source``."""
        self.name = name
        """Path or address; of several stores all of them."""
        self.path = Path(name)
        self.shards = shards
        self.manifest = manifest
        """What its writer says; of several stores the first one's that has one. None for stores of
        other programs."""
        self.fingerprint = fingerprint
        self._members: tuple[TokenStore, ...] = ()
        self._remote = any(folder.is_remote for folder in shards.folders)
        self.shard_starts: Int64Array = np.cumsum([0, *shards.num_tokens])
        self._first_documents: Int64Array = np.cumsum([0, *shards.num_documents])
        self._edges: list[int] = self.shard_starts.tolist()
        self.num_tokens = self._edges[-1]
        self._num_asked = 0
        self.num_documents = int(self._first_documents[-1])

    @classmethod
    def open(
        cls, path: Path | str, cache_dir: Path | str | None = None, *, check: bool = True
    ) -> "TokenStore":
        """Open a store after checking its manifest, the sizes of its files and their headers.

        ``check=False`` looks at no file but the manifest: for ranks beside the one that checked.
        Either way a shard is compared with the manifest before it is first read. Headers of a
        remote store are read then.

        Raises:
            DataError: something is missing, truncated, changed or of another format; or a remote
                store without ``cache_dir``, or without the package that reads it.
        """
        folder, prefix = locate(str(path), cache_dir)
        if prefix is not None:
            shard = foreign_shard(folder, prefix)
            fingerprint = foreign_fingerprint((shard.idx_file, shard.bin_file))
            return cls(str(path), Shards.of(folder, shard), None, fingerprint)
        manifest = manifest_of(folder)
        folder = folder.keyed(manifest.hash)
        if check:
            check_files(folder, manifest)
        return cls(str(path), Shards.listed(folder, manifest), manifest, manifest.hash)

    @classmethod
    def joined(cls, stores: Sequence["TokenStore"]) -> "TokenStore":
        """Return stores as one, in the given order: windows cross their edges.

        Raises:
            DataError: two are the same, or they are of different tokenizers.
        """
        seen: dict[str, TokenStore] = {}
        for store in stores:
            if store.fingerprint in seen:
                raise DataError(
                    f"{store.name} holds the same tokens as {seen[store.fingerprint].name}; list "
                    "a store once: epochs repeat it as often as its share asks for"
                )
            seen[store.fingerprint] = store
        first = next((s for s in stores if s.manifest is not None), None)
        for store in stores:
            if first is not None and first.manifest is not None:
                store.check_tokenizer(first.manifest.tokenizer_hash)
        digest = blake3.blake3(derive_key_context="llmtrain joined stores v1")
        digest.update(json.dumps([store.fingerprint for store in stores]).encode())
        joined = cls(
            ", ".join(store.name for store in stores),
            Shards.joined([store.shards for store in stores]),
            None if first is None else first.manifest,
            str(digest.hexdigest()),
        )
        joined._members = tuple(stores)
        return joined

    @property
    def members(self) -> tuple["TokenStore", ...]:
        """The stores it was joined of; itself where there is only one."""
        return self._members or (self,)

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Compare with the tokenizer the store was made with; stores of other programs pass.

        Raises:
            DataError: the hashes differ.
        """
        if self.manifest is not None and self.manifest.tokenizer_hash != tokenizer_hash:
            raise DataError(
                f"{self.name} was made with tokenizer {self.manifest.tokenizer_hash[:16]}, the "
                f"given tokenizer is {tokenizer_hash[:16]}; set tokenizer.path to the store's own "
                "or tokenize the source again"
            )

    def check_ends(self) -> None:
        """Compare both ends of the first shards with the manifest; others are when first read.

        Nothing is read of a remote store.

        Raises:
            DataError: a file is another one of the same size.
        """
        for shard in islice(self.shards, 0 if self._remote else SHARDS_COMPARED):
            shard.check_ends()

    def tokens(self, start: int, end: int) -> TokenArray:
        """Return the tokens [start, end) in the store's dtype; a copy only across shard edges."""
        parts = self._parts(start, end)
        pieces = [self.shards[number].tokens(low, high) for number, low, high in parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def has_roles(self) -> bool:
        """Whether any of its tokens have roles (``llmtrain.data.roles``)."""
        return any(m.manifest is not None and m.manifest.has_roles for m in self.members)

    def roles(self, start: int, end: int) -> RoleArray:
        """Return the roles of the tokens [start, end), ANSWER where a member has none."""
        parts = self._parts(start, end)
        pieces = [self.shards[number].roles(low, high) for number, low, high in parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def fetch(self, starts: Int64Array, lengths: Int64Array) -> None:
        """Have the tokens [starts[i], starts[i] + lengths[i]) of a remote store, and their roles.

        What lies beyond the end of the store is left out. ``tokens`` does this itself; whoever
        reads ``shards[i].data`` asks first. Nothing happens where the store is no remote one.
        """
        if not self._remote:
            return
        from llmtrain.data.remote import fetch_all

        ends = np.minimum(starts + lengths, self.num_tokens)
        parts = [
            (self.shards[number], low, high)
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            for number, low, high in self._parts(start, end)
        ]
        spans = [(shard.bin_file, *shard.byte_span(low, high)) for shard, low, high in parts]
        spans += [(shard.roles_file, low, high) for shard, low, high in parts if shard.roles_file]
        fetch_all(spans)

    def boundaries(self, starts: Int64Array, length: int) -> tuple[Int64Array, Int64Array]:
        """Return where documents start inside the windows [starts[r], starts[r] + length).

        Two arrays of equal length, sorted: the row r and the offset from ``starts[r]``.
        """
        self._num_asked += len(starts)
        few = self._num_asked * DOCUMENTS_PER_WINDOW < self.num_documents
        known = None if few else self._known_starts
        if known is not None:
            low, high = np.searchsorted(known, starts), np.searchsorted(known, starts + length)
            counts = high - low
            skipped = np.repeat(np.cumsum(counts) - counts - low, counts)
            offset = known[np.arange(counts.sum()) - skipped] - np.repeat(starts, counts)
            return np.repeat(np.arange(len(starts)), counts), offset
        return self._bisected_boundaries(starts, length)

    @cached_property
    def _known_starts(self) -> Int64Array | None:
        """The first token of every document, where the store has few enough to keep that."""
        if self.num_documents > MAX_KNOWN_STARTS or len(self.shards) > MAX_KNOWN_SHARDS:
            return None
        pairs = zip(self.shards, self.shard_starts[:-1], strict=True)
        return np.concatenate(
            [
                start + shard.document_starts(np.arange(shard.num_documents))
                for shard, start in pairs
            ]
        )

    def _bisected_boundaries(
        self, starts: Int64Array, length: int
    ) -> tuple[Int64Array, Int64Array]:
        rows, offsets = list[int](), list[int]()
        for row, start in enumerate(starts.tolist()):
            end = min(start + length, self.num_tokens)
            for number, low, high in self._parts(start, end) if start < end else ():
                found = self.shards[number].starts_within(low, high)
                rows += [row] * len(found)
                base = int(self.shard_starts[number]) - start
                offsets += [base + token for token in found]
        return np.array(rows, dtype=np.int64), np.array(offsets, dtype=np.int64)

    def document_boundaries(self, start: int, end: int) -> Int64Array:
        """Return the first tokens of the documents that start in [start, end)."""
        return start + self.boundaries(np.array([start]), end - start)[1]

    def document_span(self, document: int) -> tuple[int, int]:
        """Return the tokens [start, end) of one document, EOS included."""
        shard, local = self._locate(document)
        low, high = self.shards[shard].document_starts(np.array([local, local + 1])).tolist()
        return int(self.shard_starts[shard]) + low, int(self.shard_starts[shard]) + high

    def document(self, document: int) -> TokenArray:
        """Return the tokens of one document, EOS included."""
        return self.tokens(*self.document_span(document))

    def document_at(self, token: int) -> int:
        """Return the document that holds the token at global position ``token``."""
        self._parts(token, token + 1)
        shard = int(np.searchsorted(self.shard_starts, token, side="right")) - 1
        local = np.array([token + 1 - self.shard_starts[shard]])
        after = int(self.shards[shard].first_document_from(local)[0])
        return int(self._first_documents[shard]) + after - 1

    def record(self, document: int) -> DocumentRecord:
        """Return the origin of one document."""
        shard, local = self._locate(document)
        return read_record(self.records_path(shard), local)

    def records(self, documents: Iterable[int]) -> dict[int, DocumentRecord]:
        """Return the origins of some documents; every row group of a shard is read once."""
        by_shard: dict[int, list[int]] = {}
        for document in documents:
            shard, local = self._locate(document)
            by_shard.setdefault(shard, []).append(local)
        found: dict[int, DocumentRecord] = {}
        for shard, chosen in by_shard.items():
            first, path = int(self._first_documents[shard]), self.records_path(shard)
            found |= {first + d: record for d, record in read_selected(path, chosen).items()}
        return found

    def folder_of(self, document: int) -> Folder:
        """Return the folder of the store that a document is in, one of several where joined."""
        return self.shards.folders[self._locate(document)[0]]

    def records_path(self, shard: int) -> Path:
        """Return ``docs.parquet`` of shard number ``shard`` on this machine, fetched if need be."""
        name = self.shards[shard].name.rpartition("/")[2] + ".docs.parquet"
        return self.shards.folders[shard].whole(name)

    def _locate(self, document: int) -> tuple[int, int]:
        if not 0 <= document < self.num_documents:
            raise DataError(
                f"{self.name} holds {self.num_documents:,} documents; {document:,} is outside"
            )
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return shard, document - int(self._first_documents[shard])

    def _parts(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the shards of the tokens [start, end): number, and from where to where in each."""
        if not 0 <= start < end <= self.num_tokens:
            raise DataError(
                f"{self.name} holds {self.num_tokens:,} tokens; [{start:,}, {end:,}) is outside"
            )
        edges = self._edges
        number = bisect_right(edges, start) - 1
        parts = []
        while start < end:
            base, stop = edges[number], edges[number + 1]
            parts.append((number, start - base, min(end, stop) - base))
            start, number = stop, number + 1
        return parts


def open_source(
    paths: str | Sequence[str], cache_dir: str | None = None, *, check: bool = True
) -> TokenStore:
    """Open the store of a source, or several as one; see ``TokenStore.open`` and ``joined``.

    Raises:
        DataError: what those raise, or the list is empty.
    """
    if isinstance(paths, str):
        return TokenStore.open(paths, cache_dir, check=check)
    if not paths:
        raise DataError("the list of stores is empty; name a store or leave the source out")
    stores = [TokenStore.open(path, cache_dir, check=check) for path in paths]
    return stores[0] if len(stores) == 1 else TokenStore.joined(stores)


def open_sources(
    sources: Mapping[str, str | Sequence[str]], cache_dir: str | None = None, *, check: bool = True
) -> dict[str, TokenStore]:
    """Open the stores of several sources by name; see ``open_source``."""
    return {name: open_source(at, cache_dir, check=check) for name, at in sources.items()}


def verify(path: Path | str) -> TokenStore:
    """Read every byte of a store: digests, indices, roles and records; return the open store.

    Raises:
        DataError: names every file that differs from the manifest.
    """
    store = TokenStore.open(path)
    if store.manifest is None:
        return store
    problems = []
    for number, (info, shard) in enumerate(zip(store.manifest.shards, store.shards, strict=True)):
        for end, digest in sorted(info.sha256.items()):
            file = store.path / f"{info.name}.{end}"
            found = file_sha256(file)
            if found != digest:
                problems.append(
                    f"{file} has sha256 {found[:16]}, its manifest says {digest[:16]}; it is "
                    "damaged: restore it or write the store again"
                )
        if not problems:
            shard.check_index()
            counts = read_counts(store.records_path(number))
            if not np.array_equal(counts, shard.sequence_lengths()):
                problems.append(f"{info.name}.docs.parquet and {info.name}.idx disagree on lengths")
            if shard.roles_file is not None:
                lengths = shard.sequence_lengths().astype(np.int64)
                check_roles(shard.roles(0, shard.num_tokens), lengths, shard.roles_file.name)
    if problems:
        raise DataError("\n".join(problems))
    return store
