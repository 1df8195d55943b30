"""A token store: a folder of Megatron shards with the origin of every document and a manifest.

``DIR/part-00000.{bin,idx,docs.parquet}`` ... and ``DIR/manifest.json``, written last: a folder
without a manifest is unfinished and is not read. A path prefix (``DIR/NAME`` for ``DIR/NAME.bin``
and ``DIR/NAME.idx``), or a folder that holds exactly one such pair, is a store of another program
and opens too. Any number of processes may write shards; one writes the manifest.

    with ShardWriter(folder, 0, vocab_size=32_000, eos_id=2) as writer:
        writer.add([5, 6, 7], DocumentRecord(id="..."))
    write_manifest(folder, [writer.info], tokenizer_hash=..., vocab_size=32_000, eos_id=2)
    TokenStore.open("stores/wiki").tokens(0, 4)
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import blake3
import numpy as np

from llmtrain.data.indexed import IndexedShard, Int64Array, TokenArray
from llmtrain.data.lineage import DocumentRecord, read_counts, read_record
from llmtrain.data.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    file_sha256,
    read_manifest,
    write_manifest,
)
from llmtrain.data.writer import ShardWriter
from llmtrain.errors import DataError

__all__ = [
    "MANIFEST",
    "Manifest",
    "ShardInfo",
    "ShardWriter",
    "TokenStore",
    "read_manifest",
    "verify",
    "write_manifest",
]

MAX_KNOWN_STARTS = 1 << 21
"""Stores with more documents keep no list of their starts (8 bytes each) and bisect the index."""
_FINGERPRINT_BYTES = 1 << 20
RAW_SUFFIXES = (".jsonl", ".json", ".gz", ".zst", ".parquet", ".txt", ".warc", ".arrow")
"""Endings of files that hold text, not tokens."""


class TokenStore:
    """Random access to the tokens and the document boundaries of one source."""

    def __init__(
        self,
        path: Path,
        shards: Sequence[IndexedShard],
        manifest: Manifest | None,
        fingerprint: str,
    ) -> None:
        """Use ``TokenStore.open``."""
        self.path = path
        self.shards = tuple(shards)
        self.manifest = manifest
        self.fingerprint = fingerprint
        self.shard_starts: Int64Array = np.cumsum([0] + [shard.num_tokens for shard in shards])
        self._first_documents: Int64Array = np.cumsum([0] + [s.num_documents for s in shards])
        self.num_tokens = int(self.shard_starts[-1])
        self.num_documents = int(self._first_documents[-1])

    @classmethod
    def open(cls, path: Path | str) -> "TokenStore":
        """Open a store after checking its manifest, the sizes of its files and their headers.

        Raises:
            DataError: something is missing, truncated, changed or of another format.
        """
        path = Path(path)
        prefix = _foreign_prefix(path)
        if prefix is not None:
            shard = IndexedShard(prefix)
            shard.check_index()
            return cls(path, [shard], None, _foreign_fingerprint(shard))
        manifest = read_manifest(path)
        shards = [_open_shard(path, info, manifest) for info in manifest.shards]
        return cls(path, shards, manifest, manifest.hash)

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Compare with the tokenizer the store was made with; stores of other programs pass.

        Raises:
            DataError: the hashes differ.
        """
        if self.manifest is not None and self.manifest.tokenizer_hash != tokenizer_hash:
            raise DataError(
                f"{self.path} was made with tokenizer {self.manifest.tokenizer_hash[:16]}, the "
                f"given tokenizer is {tokenizer_hash[:16]}; set tokenizer.path to the store's own "
                "or tokenize the source again"
            )

    def tokens(self, start: int, end: int) -> TokenArray:
        """Return the tokens [start, end) in the store's dtype; a copy only across shard edges."""
        parts = self._parts(start, end)
        pieces = [shard.tokens(low, high) for shard, low, high in parts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def read_windows(
        self, starts: Int64Array, rows: Int64Array, inputs: Int64Array, targets: Int64Array
    ) -> None:
        """Fill row ``rows[i]`` of both [R, S] arrays from ``starts[i]`` and from one later."""
        length = inputs.shape[1] + 1
        shard_of = np.searchsorted(self.shard_starts, starts, side="right") - 1
        inside = starts + length <= self.shard_starts[shard_of + 1]
        local = starts - self.shard_starts[shard_of]
        for row, shard, low, whole in zip(
            rows.tolist(), shard_of.tolist(), local.tolist(), inside.tolist(), strict=True
        ):
            if whole:
                window = self.shards[shard].data[low : low + length]
            else:
                start = int(self.shard_starts[shard]) + low
                window = self.tokens(start, start + length)
            inputs[row] = window[:-1]
            targets[row] = window[1:]

    def boundaries(self, starts: Int64Array, length: int) -> tuple[Int64Array, Int64Array]:
        """Return where documents start inside the windows [starts[r], starts[r] + length).

        Two arrays of equal length, sorted: the row r and the offset from ``starts[r]``.
        """
        known = self._known_starts
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
        if self.num_documents > MAX_KNOWN_STARTS:
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
        rows, offsets = [], []
        first = np.searchsorted(self.shard_starts, starts, side="right") - 1
        last = np.searchsorted(self.shard_starts, starts + length, side="left") - 1
        for number in range(int(first.min()), int(last.max()) + 1) if len(starts) else ():
            (touching,) = np.nonzero((first <= number) & (number <= last))
            if not len(touching):
                continue
            shard, shard_start = self.shards[number], self.shard_starts[number]
            local = starts[touching] - shard_start
            found = shard.first_document_from(np.concatenate([local, local + length]))
            low, high = found[: len(local)], found[len(local) :]
            counts = high - low
            skipped = np.repeat(np.cumsum(counts) - counts - low, counts)
            documents = np.arange(counts.sum()) - skipped
            rows.append(np.repeat(touching, counts))
            offsets.append(shard.document_starts(documents) - np.repeat(local, counts))
        row = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        offset = np.concatenate(offsets) if offsets else np.zeros(0, dtype=np.int64)
        order = np.lexsort((offset, row))
        return row[order], offset[order]

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
        prefix = self.shards[shard].prefix
        return read_record(prefix.with_name(prefix.name + ".docs.parquet"), local)

    def _locate(self, document: int) -> tuple[int, int]:
        if not 0 <= document < self.num_documents:
            raise DataError(
                f"{self.path} holds {self.num_documents:,} documents; {document:,} is outside"
            )
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        return shard, document - int(self._first_documents[shard])

    def _parts(self, start: int, end: int) -> list[tuple[IndexedShard, int, int]]:
        if not 0 <= start < end <= self.num_tokens:
            raise DataError(
                f"{self.path} holds {self.num_tokens:,} tokens; [{start:,}, {end:,}) is outside"
            )
        number = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        parts = []
        while start < end:
            base, stop = int(self.shard_starts[number]), int(self.shard_starts[number + 1])
            parts.append((self.shards[number], start - base, min(end, stop) - base))
            start, number = stop, number + 1
        return parts


def verify(path: Path | str) -> TokenStore:
    """Read every byte of a store: digests, indices, vocabulary and records; return the open store.

    Raises:
        DataError: names every file that differs from the manifest.
    """
    store = TokenStore.open(path)
    if store.manifest is None:
        return store
    problems = []
    for info, shard in zip(store.manifest.shards, store.shards, strict=True):
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
            counts = read_counts(store.path / f"{info.name}.docs.parquet")
            if not np.array_equal(counts, shard.sequence_lengths()):
                problems.append(f"{info.name}.docs.parquet and {info.name}.idx disagree on lengths")
    if problems:
        raise DataError("\n".join(problems))
    return store


def _open_shard(directory: Path, info: ShardInfo, manifest: Manifest) -> IndexedShard:
    for end, size in sorted(info.sizes.items()):
        path = directory / f"{info.name}.{end}"
        if not path.is_file():
            raise DataError(
                f"{path} is missing, its manifest lists it; copy or write the store again"
            )
        if path.stat().st_size != size:
            raise DataError(
                f"{path} holds {path.stat().st_size:,} bytes, its manifest says {size:,}; it is "
                "damaged or still being copied: copy or write the store again"
            )
    shard = IndexedShard(directory / info.name)
    expected = (manifest.dtype, info.num_tokens, info.num_documents)
    found = (shard.dtype.newbyteorder("=").name, shard.num_tokens, shard.num_documents)
    if found != expected:
        raise DataError(
            f"{shard.idx_path} has (dtype, tokens, documents) {found}, its manifest says "
            f"{expected}; files of two stores are mixed: write the store again"
        )
    return shard


def _foreign_prefix(path: Path) -> Path | None:
    """Return the prefix of a store of another program; None where a manifest has to be."""
    if path.name.endswith(RAW_SUFFIXES) or any(c in str(path) for c in "*?"):
        raise _raw_text(path, path)
    if path.suffix in (".bin", ".idx") and path.is_file():
        return path.with_suffix("")
    if not path.is_dir():
        if path.with_name(path.name + ".idx").is_file():
            return path
        found = "is a file" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {found}; expected the folder of a token store or the path prefix of a "
            "Megatron .bin/.idx pair: check the path, or make it with `llmtrain-data tokenize`"
        )
    if (path / MANIFEST).is_file():
        return None
    pairs = [p.with_suffix("") for p in path.glob("*.idx") if p.with_suffix(".bin").is_file()]
    parquet = list(path.glob("part-*.docs.parquet"))
    if len(pairs) == 1 and not parquet:
        return pairs[0]
    if not pairs and not parquet:
        raw = sorted(p for p in path.iterdir() if p.name.endswith(RAW_SUFFIXES))
        if raw:
            raise _raw_text(path, path / f"*{''.join(raw[0].suffixes[-2:])}")
    return None


def _raw_text(path: Path, files: Path) -> DataError:
    name = path.name.split(".")[0].strip("*") or "mine"
    return DataError(
        f"{path} holds text, a source has to be a token store; make one with\n"
        f"  llmtrain-data tokenize input={files} text_field=text tokenizer=TOKENIZER "
        f"out=stores/{name}\n"
        f"and set data.sources.{name}=stores/{name}"
    )


def _foreign_fingerprint(shard: IndexedShard) -> str:
    """Hash sizes and both ends of both files: what tells two stores apart without reading them."""
    digest = blake3.blake3()
    for path in (shard.idx_path, shard.bin_path):
        size = path.stat().st_size
        digest.update(f"{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return str(digest.hexdigest())
