"""From documents to a tokenizer and to token stores, with the origin of every document kept.

A part of a store (``part-00000.{bin,idx,docs.parquet}``) is written by one task; which shards it
holds depends on their sizes alone. Tokens are counted three times (by the encoder, by the index, by
the size of the file) and have to agree.

    llmtrain-data tokenize input=data/*.jsonl.zst text_field=text tokenizer=DIR out=stores/mine
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import TokenizerTrainingConfig
from data_pipeline.document import Document
from data_pipeline.io import RawFile, TextFields, Unreadable, read_text_file
from data_pipeline.manifest import ConservationError, Counts, TaskResult
from data_pipeline.shards import Shard, digest_of, read_documents, read_table
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.manifest import ShardInfo
from llmtrain.data.store import ShardWriter
from llmtrain.tokenizer.tokenizer import Tokenizer, load, train_sentencepiece

_BATCH = 256
_ENDINGS = ("bin", "idx", "docs.parquet")


def train_tokenizer(
    folder: Path, out: str, shards: Sequence[Shard], settings: TokenizerTrainingConfig
) -> TaskResult:
    """Train on a sample of the documents: every document whose id hashes below the share."""
    total = sum(shard.text_bytes for shard in shards)
    limit = min(1.0, settings.sample_bytes / max(1, total)) * 2**64
    texts = (
        text
        for shard in shards
        for id_, text in _id_and_text(Path(out), shard)
        if int(id_[:16], 16) < limit
    )
    train_sentencepiece(
        texts, folder, vocab_size=settings.vocab_size, kind=settings.kind,
        max_sample_bytes=settings.sample_bytes,
    )  # fmt: skip
    names = sorted(path.name for path in folder.iterdir())
    return TaskResult(files={name: digest_of((folder / name).read_bytes()) for name in names})


def _id_and_text(out: Path, shard: Shard) -> Iterator[tuple[str, str]]:
    table = read_table(out, shard, ["id", "text"])
    return zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True)


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


def tokenize_shards(
    folder: Path, out: str, store: str, index: int, shards: Sequence[Shard], tokenizer: str
) -> TaskResult:
    """Write one part of a store (``store`` is its folder below the stage's target)."""
    documents = (document for shard in shards for document in read_documents(Path(out), shard))
    counts = Counts(
        documents_in=sum(shard.rows for shard in shards),
        characters_in=sum(shard.text_characters for shard in shards),
        bytes_in=sum(shard.text_bytes for shard in shards),
    )
    return _write_part(folder, store, index, documents, counts, load(tokenizer))


def tokenize_file(
    folder: Path, store: str, index: int, file: RawFile, fields: TextFields, tokenizer: str
) -> TaskResult:
    """Write one part of a store from one raw file of text, one batch in memory at a time."""
    counts = Counts()
    return _write_part(
        folder, store, index, _counted(file, fields, counts), counts, load(tokenizer)
    )


def _counted(file: RawFile, fields: TextFields, counts: Counts) -> Iterator[Document]:
    for item in read_text_file(file, fields):
        counts.documents_in += 1
        if isinstance(item, Unreadable):
            counts.quarantined["unreadable"] = counts.quarantined.get("unreadable", 0) + 1
            continue
        counts.characters_in += len(item.text)
        counts.bytes_in += len(item.text.encode())
        if item.text:
            yield item
        else:
            counts.dropped["no_text"] = counts.dropped.get("no_text", 0) + 1


def _write_part(
    folder: Path, store: str, index: int, documents: Iterable[Document], counts: Counts,
    tokenizer: Tokenizer,
) -> TaskResult:  # fmt: skip
    tokens = 0
    writer = ShardWriter(
        folder / store, index, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    with writer:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                record = to_record(document)
                writer.add(ids, record)
                tokens += len(ids) + 1
                counts.documents_out += 1
                counts.characters_out += len(document.text)
                counts.bytes_out += record.text_bytes
    counts.tokens = tokens
    info = writer.info
    _check_tokens(info, tokens, writer.dtype)
    names = {f"{store}/{info.name}.{end}": info.sha256[end] for end in _ENDINGS if info.sha256}
    return TaskResult(
        counts=counts, files={name.removeprefix("./"): digest for name, digest in names.items()},
        details={"store": store, "part": asdict(info)},
    )  # fmt: skip


def _check_tokens(info: ShardInfo, tokens: int, dtype: np.dtype[Any]) -> None:
    stored = info.sizes.get("bin", 0) // dtype.itemsize
    if not tokens == info.num_tokens == stored:
        raise ConservationError(
            f"{info.name}: {tokens} tokens encoded, {info.num_tokens} in the index, {stored} in "
            "the .bin file"
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def to_record(document: Document) -> DocumentRecord:
    """Return what a store keeps of a document."""
    return DocumentRecord(
        id=document.id,
        url=document.url,
        source_file_id=document.source_file_id,
        member_offset=document.member_offset,
        member_length=document.member_length,
        payload_sha256=document.payload_sha256,
        extractor_name=document.extractor.name,
        extractor_version=document.extractor.version,
        extractor_options=document.extractor.options,
        extracted_sha256=document.extracted_sha256,
        text_bytes=len(document.text.encode()),
        cluster=document.cluster,
        language=document.language,
        edits=document.edits,
    )


def part_infos(results: Iterable[TaskResult]) -> dict[str, list[ShardInfo]]:
    """Return store folder -> its parts, for ``write_manifest``."""
    stores: dict[str, list[ShardInfo]] = {}
    for result in results:
        part = ShardInfo(**result.details["part"])
        stores.setdefault(result.details["store"], []).append(part)
    return stores
