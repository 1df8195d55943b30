"""From documents to a tokenizer and to token stores, with the origin of every document kept.

A part of a store (``part-00000.{bin,idx,docs.parquet}``) is written by one task; which shards it
holds depends on their sizes alone. Tokens are counted three times (by the encoder, by the index, by
the size of the file) and have to agree.

    llmtrain-data tokenize input=data/*.jsonl.zst text_field=text tokenizer=DIR out=stores/mine
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import FieldsConfig, TokenizerTrainingConfig
from data_pipeline.document import Document
from data_pipeline.io import RawFile, Unreadable, read_text_file
from data_pipeline.manifest import ConservationError, Counts, TaskResult
from data_pipeline.shards import Shard, digest_of, read_documents, read_table
from data_pipeline.split import held_out_by_cluster
from data_pipeline.stages import Stage
from llmtrain.data.lineage import DocumentRecord
from llmtrain.data.store import MANIFEST, ShardInfo, ShardWriter, write_manifest
from llmtrain.tokenizer.tokenizer import Tokenizer, load, train_sentencepiece

HELD_OUT = "validation"
"""Folder of the held-out documents inside the store of `llmtrain-data tokenize`."""
_BATCH = 256


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
    return _write_parts(folder, index, ((store, d) for d in documents), counts, load(tokenizer))


def tokenize_file(
    folder: Path, index: int, file: RawFile, fields: FieldsConfig, share: float, tokenizer: str
) -> TaskResult:
    """Write one part of a store from one raw file of text, one batch in memory at a time.

    ``share`` of the documents, by a hash of their ids, goes to the store ``validation`` inside it.
    """
    counts = Counts()
    documents = (
        (HELD_OUT if held_out_by_cluster(document.id, share) else ".", document)
        for document in _counted(file, fields, counts)
    )
    return _write_parts(folder, index, documents, counts, load(tokenizer))


def _counted(file: RawFile, fields: FieldsConfig, counts: Counts) -> Iterator[Document]:
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


def _write_parts(
    folder: Path, index: int, documents: Iterable[tuple[str, Document]], counts: Counts,
    tokenizer: Tokenizer,
) -> TaskResult:  # fmt: skip
    """Write part ``index`` of every store that documents, (store, document), come for."""
    writers: dict[str, ShardWriter] = {}
    tokens: Counter[str] = Counter()
    with ExitStack() as stack:
        for batch in _batches(documents):
            encoded = tokenizer.encode_batch([document.text for _, document in batch])
            for (store, document), ids in zip(batch, encoded, strict=True):
                if store not in writers:
                    writers[store] = stack.enter_context(_writer(folder / store, index, tokenizer))
                record = to_record(document)
                writers[store].add(ids, record)
                tokens[store] += len(ids) + 1
                counts.documents_out += 1
                counts.characters_out += len(document.text)
                counts.bytes_out += record.text_bytes
    counts.tokens = tokens.total()
    result = TaskResult(counts=counts, details={"parts": []})
    for store, writer in sorted(writers.items()):
        info = writer.info
        _check_tokens(info, tokens[store], writer.dtype)
        result.details["parts"].append([store, asdict(info)])
        for end, digest in info.sha256.items():
            result.files[str(Path(store) / f"{info.name}.{end}")] = digest
    return result


def _writer(folder: Path, index: int, tokenizer: Tokenizer) -> ShardWriter:
    return ShardWriter(folder, index, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)


def _check_tokens(info: ShardInfo, tokens: int, dtype: np.dtype[Any]) -> None:
    stored = info.sizes.get("bin", 0) // dtype.itemsize
    if not tokens == info.num_tokens == stored:
        raise ConservationError(
            f"{info.name}: {tokens} tokens encoded, {info.num_tokens} in the index, {stored} in "
            "the .bin file"
        )


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH)):
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


def withdraw(target: Path, stores: Iterable[str]) -> None:
    """Take the manifests of an earlier run away: no store is read while its parts change."""
    for store in stores:
        (target / store / MANIFEST).unlink(missing_ok=True)


def parts_of(results: Iterable[TaskResult]) -> dict[str, list[ShardInfo]]:
    """Return store folder -> its parts."""
    parts: dict[str, list[ShardInfo]] = {}
    for result in results:
        for store, info in result.details["parts"]:
            parts.setdefault(store, []).append(ShardInfo(**info))
    return parts


def publish(
    stage: Stage, results: Sequence[TaskResult], tokenizer: Tokenizer, pipeline_hash: str
) -> TaskResult:
    """Write the manifest of every store the tasks wrote parts of; from then on they are read."""
    files = {}
    for store, infos in sorted(parts_of(results).items()):
        written = write_manifest(
            stage.target / store, infos, tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, pipeline_hash=pipeline_hash,
        )  # fmt: skip
        files[str(Path(store) / MANIFEST)] = written.hash
    return TaskResult(files=files)
