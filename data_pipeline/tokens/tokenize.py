"""From documents to the parts of token stores, with the origin of every document kept.

A part (``part-00000.{bin,idx,docs.parquet}``) is written by one task, a batch of documents in
memory at a time; where a part ends depends on the sizes of the texts alone. Tokens are counted
three times (by the encoder, by the index, by the size of the file) and have to agree. With a
``Scatter``, what a task encodes goes to a file in the order of the shuffle (``shuffle``) instead.

    llmtrain-data tokenize input=data/*.jsonl.zst text_field=text tokenizer=DIR out=stores/mine
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.config.extract import FieldsConfig
from data_pipeline.document import Document
from data_pipeline.manifest import ConservationError, Counts, TaskResult
from data_pipeline.read.inputs import RawFile
from data_pipeline.read.rows import Unreadable, read_text_file
from data_pipeline.shards import Shard, read_batches, text_lengths, to_table
from data_pipeline.tokens.shuffle import Scatter, ScatterFiles, read_range
from data_pipeline.tokens.split import held_out_by_cluster
from llmtrain.data.lineage import encode_edit_lists
from llmtrain.data.lineage import schema as record_schema
from llmtrain.data.roles import RoleArray
from llmtrain.data.store import ShardInfo, ShardWriter
from llmtrain.errors import DataError
from llmtrain.tokenizer.encoders import Encoder, make_encoder
from llmtrain.tokenizer.tokenizer import Tokenizer, load

HELD_OUT = "validation"
"""Folder of the held-out documents inside the store of `llmtrain-data tokenize`."""
_BATCH_DOCUMENTS = 512
_BATCH_BYTES = 1_000_000
_COPIED = tuple(
    name for name in record_schema().names if name not in ("text_bytes", "num_tokens", "edits")
)
"""Columns of a document shard that a store keeps as they are."""


class TokenizerSpec(NamedTuple):
    """What a worker needs to encode."""

    path: str
    """The tokenizer's folder or file."""
    hash: str
    """Its hash: a worker that finds another one refuses."""
    fast: bool
    """Whether the driver found the fast encoder's ids equal."""


class EncodedBatch(NamedTuple):
    """Documents as tokens."""

    tokens: npt.NDArray[Any]
    """Ids of all documents, without EOS."""
    offsets: npt.NDArray[np.int64]
    """[documents + 1]: where each begins in ``tokens``."""
    records: pa.Table
    """What a store keeps of each; ``lineage.schema()`` without ``num_tokens``."""
    roles: RoleArray | None = None
    """One of each token and of the EOS behind every document, where they have roles."""

    def slice(self, start: int, end: int) -> "EncodedBatch":
        """Return the documents [start, end)."""
        records = self.records.slice(start, end - start)
        offsets, roles = self.offsets[start : end + 1], self.roles
        if roles is not None:
            roles = roles[
                offsets[0] - self.offsets[0] + start : offsets[-1] - self.offsets[0] + end
            ]
        return EncodedBatch(self.tokens, offsets, records, roles)


class Sink(Protocol):
    """Something that takes encoded documents and says in the end what it wrote."""

    def add(self, store: str, batch: EncodedBatch) -> None:
        """Append documents of one store."""
        ...

    def close(self) -> TaskResult:
        """Finish the files."""
        ...


class PartFiles:
    """The parts one task writes; a further piece begins where a part would pass ``part_bytes``."""

    def __init__(
        self, folder: Path, index: int, *, vocab_size: int, eos_id: int, part_bytes: int
    ) -> None:
        """Part ``index`` of every store that documents come for, below ``folder``."""
        self._folder, self._index, self._part_bytes = folder, index, part_bytes
        self._sizes = {"vocab_size": vocab_size, "eos_id": eos_id}
        self._stack = ExitStack()
        self._writers: dict[str, ShardWriter] = {}
        self._pieces: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._text_bytes: Counter[str] = Counter()
        self._result = TaskResult(details={"parts": []})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, store: str, batch: EncodedBatch) -> None:
        """Append documents; a document larger than ``part_bytes`` has a part of its own."""
        ends = np.cumsum(batch.records.column("text_bytes").to_numpy())
        start = done = 0
        while start < len(ends):
            room = self._part_bytes - self._text_bytes[store]
            end = int(np.searchsorted(ends, done + room, side="right"))
            if end == start and not self._text_bytes[store]:
                end = start + 1
            if end > start:
                writer = self._writer(store)
                piece = batch.slice(start, end)
                writer.add_batch(piece.tokens, piece.offsets, piece.records, piece.roles)
                self._tokens[store] += int(piece.offsets[-1] - piece.offsets[0]) + end - start
                self._text_bytes[store] += int(ends[end - 1]) - done
                start, done = end, int(ends[end - 1])
            if start < len(ends):
                self._finish(store)

    def close(self) -> TaskResult:
        """Finish the open parts."""
        for store in sorted(self._writers):
            self._finish(store)
        return self._result

    def _writer(self, store: str) -> ShardWriter:
        if store not in self._writers:
            writer = ShardWriter(
                self._folder / store, self._index, piece=self._pieces[store], **self._sizes
            )
            self._writers[store] = self._stack.enter_context(writer)
            self._pieces[store] += 1
        return self._writers[store]

    def _finish(self, store: str) -> None:
        writer = self._writers.pop(store)
        info = writer.close()
        _check_tokens(info, self._tokens[store], writer.dtype)
        part = [store, asdict(info), self._text_bytes.pop(store)]
        self._result.details["parts"].append(part)
        self._result.counts.tokens += self._tokens.pop(store)
        for end, digest in info.sha256.items():
            self._result.files[str(Path(store) / f"{info.name}.{end}")] = digest


def tokenize_shards(
    folder: Path, out: str, store: str, index: int, shards: Sequence[Shard],
    tokenizer: TokenizerSpec, part_bytes: int, scatter: Scatter | None = None,
) -> TaskResult:  # fmt: skip
    """Encode shards of documents for one store (``store`` is its folder below the target)."""
    tables = ((store, table) for shard in shards for table in read_batches(Path(out), shard))
    counts = Counts(
        documents_in=sum(shard.rows for shard in shards),
        characters_in=sum(shard.text_characters for shard in shards),
        bytes_in=sum(shard.text_bytes for shard in shards),
    )
    return _encode_all(folder, index, tables, counts, tokenizer, part_bytes, scatter)


def tokenize_file(
    folder: Path, index: int, file: RawFile, fields: FieldsConfig, share: float,
    tokenizer: TokenizerSpec, part_bytes: int, scatter: Scatter | None = None,
) -> TaskResult:  # fmt: skip
    """Encode one raw file of text, one batch in memory at a time.

    ``share`` of the documents, by a hash of their ids, goes to the store ``validation`` inside it.
    """
    counts = Counts()
    tables = (
        (store, to_table(documents))
        for batch in _batches(_counted(file, fields, counts))
        for store, documents in _by_store(batch, share)
    )
    return _encode_all(folder, index, tables, counts, tokenizer, part_bytes, scatter)


def gather_part(
    folder: Path, store: str, index: int, num_parts: int, num_ranges: int, files: Sequence[str],
    vocab_size: int, eos_id: int, part_bytes: int,
) -> TaskResult:  # fmt: skip
    """Write part ``index`` of ``num_parts`` in shuffled order, a range of keys in memory a time."""
    sizes = {"vocab_size": vocab_size, "eos_id": eos_id, "part_bytes": part_bytes}
    with PartFiles(folder, index, **sizes) as parts:
        for number in range(index * num_ranges, (index + 1) * num_ranges):
            found = read_range(files, number, num_parts * num_ranges, vocab_size)
            if found is not None:
                parts.add(store, EncodedBatch(*found))
        result = parts.close()
    result.counts = Counts()  # the documents were counted when they were scattered
    return result


def _encode_all(
    folder: Path, index: int, tables: Iterable[tuple[str, pa.Table]], counts: Counts,
    spec: TokenizerSpec, part_bytes: int, scatter: Scatter | None,
) -> TaskResult:  # fmt: skip
    """Encode (store, documents) into parts, or into scatter files."""
    tokenizer, encoder = open_encoder(spec)
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    with ExitStack() as stack:
        sink: Sink
        if scatter is None:
            sink = stack.enter_context(PartFiles(folder, index, part_bytes=part_bytes, **sizes))
        else:
            sink = stack.enter_context(
                ScatterFiles(folder, index, scatter, vocab_size=tokenizer.vocab_size)
            )
        for store, table in tables:
            batch = encode_table(encoder, table)
            counts.documents_out += table.num_rows
            counts.characters_out += int(pc.sum(pc.utf8_length(table.column("text"))).as_py() or 0)
            counts.bytes_out += int(pc.sum(batch.records.column("text_bytes")).as_py() or 0)
            counts.tokens += len(batch.tokens) + table.num_rows
            sink.add(store, batch)
        result = sink.close()
    result.counts = counts
    return result


@lru_cache(maxsize=1)
def open_encoder(spec: TokenizerSpec) -> tuple[Tokenizer, Encoder]:
    """Open the tokenizer of a stage, once in a worker.

    Raises:
        DataError: the tokenizer has changed since the stage began, or fastokens is missing here.
    """
    tokenizer = load(spec.path)
    if tokenizer.hash != spec.hash:
        raise DataError(
            f"{spec.path} has the hash {tokenizer.hash[:16]}, the stage began with "
            f"{spec.hash[:16]}; put the tokenizer back and run the command again"
        )
    return tokenizer, make_encoder(tokenizer, fast=spec.fast)


def encode_table(encoder: Encoder, table: pa.Table) -> EncodedBatch:
    """Encode a table of documents (``shards.SCHEMA``)."""
    batch = encoder.encode(table.column("text").to_pylist())
    return EncodedBatch(batch.ids, batch.offsets, to_records(table))


def to_records(table: pa.Table) -> pa.Table:
    """Return what a store keeps of documents: ``lineage.schema()`` without ``num_tokens``."""
    columns = {name: table.column(name) for name in _COPIED}
    columns["text_bytes"] = pa.array(text_lengths(table), pa.int64())
    columns["edits"] = encode_edit_lists(table.column("edits").combine_chunks())
    names = [name for name in record_schema().names if name != "num_tokens"]
    return pa.table({name: columns[name] for name in names})


def _counted(file: RawFile, fields: FieldsConfig, counts: Counts) -> Iterator[Document]:
    for item in read_text_file(file, fields):
        if isinstance(item, Unreadable):
            counts.documents_in += item.records
            lost = counts.quarantined.get("unreadable", 0)
            counts.quarantined["unreadable"] = lost + item.records
            continue
        counts.documents_in += 1
        counts.characters_in += len(item.text)
        counts.bytes_in += len(item.text.encode())
        if item.text:
            yield item
        else:
            counts.dropped["no_text"] = counts.dropped.get("no_text", 0) + 1


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Cut a stream of documents into lists of bounded number and size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _by_store(documents: list[Document], share: float) -> Iterator[tuple[str, list[Document]]]:
    held = [held_out_by_cluster(document.id, share) for document in documents]
    for store, wanted in ((".", False), (HELD_OUT, True)):
        chosen = [d for d, out in zip(documents, held, strict=True) if out == wanted]
        if chosen:
            yield store, chosen


def _check_tokens(info: ShardInfo, tokens: int, dtype: np.dtype[Any]) -> None:
    stored = info.sizes.get("bin", 0) // dtype.itemsize
    if not tokens == info.num_tokens == stored:
        raise ConservationError(
            f"{info.name}: {tokens} tokens encoded, {info.num_tokens} in the index, {stored} in "
            "the .bin file"
        )


def group_shards(shards: Sequence[Shard], part_bytes: int) -> list[list[Shard]]:
    """Cut a source's shards into consecutive groups of about ``part_bytes`` of text."""
    groups: list[list[Shard]] = []
    size = 0
    for shard in shards:
        if not groups or size + shard.text_bytes > part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.text_bytes
    return groups
