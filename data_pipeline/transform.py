"""Tasks that read one file and write documents: extraction of a raw file, steps over a shard.

Every document that comes in goes out to ``documents/``, to ``dropped/`` with its reason, or, where
a record could not be read at all, to ``quarantined/`` with its place in the raw file. Texts are
changed by steps only, and a step's edit map is checked against both texts before it is believed.

    extract_file(folder, stage="00-extract", number=0, file=raw, settings=settings)
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from data_pipeline.config import ExtractConfig, FieldsConfig
from data_pipeline.document import Document, Run, compose, identity
from data_pipeline.extract import NO_EXTRACTOR, payload_text
from data_pipeline.io import RawFile, Unreadable, document_id, read_text_file
from data_pipeline.manifest import ConservationError, Counts, TaskResult
from data_pipeline.shards import (
    Shard,
    digest_of,
    read_documents,
    text_size,
    to_table,
    with_reasons,
    write_durably,
    write_table,
)
from data_pipeline.step import Dropped, Step
from data_pipeline.steps import StepSpec, build_step
from data_pipeline.warc import Damaged, Record, read_warc
from llmtrain.errors import DataError


@dataclass(kw_only=True)
class Sink:
    """Writes the document shards of one task and counts what it writes."""

    folder: Path
    """The attempt's folder."""
    stage: str
    """Name of the stage."""
    source: str
    """Source the documents belong to."""
    name: str
    """File name of the shards, without ending."""
    result: TaskResult = field(default_factory=TaskResult)
    """What the task hands back."""

    def write_kept(self, table: pa.Table, name: str | None = None) -> None:
        """Write documents that go on; no file for none."""
        if table.num_rows:
            shard = self._write("documents", name or self.name, table)
            self.result.shards.append(shard)
            counts = self.result.counts
            counts.documents_out += shard.rows
            counts.characters_out += shard.text_characters
            counts.bytes_out += shard.text_bytes

    def write_dropped(self, table: pa.Table, reasons: Sequence[str]) -> None:
        """Write documents that stop here, as they came in, with a reason each."""
        if table.num_rows:
            shard = self._write("dropped", self.name, with_reasons(table, reasons))
            self.result.dropped.append(shard)
            counts = self.result.counts
            counts.characters_dropped += shard.text_characters
            for reason in reasons:
                counts.dropped[reason] = counts.dropped.get(reason, 0) + 1

    def _write(self, kind: str, name: str, table: pa.Table) -> Shard:
        relative = f"{kind}/{name}.parquet"
        digest, size = write_table(self.folder / relative, table)
        text_bytes, characters = text_size(table.column("text").to_pylist())
        return Shard(
            path=f"stages/{self.stage}/{relative}", source=self.source, rows=table.num_rows,
            text_bytes=text_bytes, text_characters=characters, digest=digest, size=size,
        )  # fmt: skip

    def count_in(self, rows: int, characters: int, text_bytes: int) -> None:
        """Count documents the task has read."""
        counts = self.result.counts
        counts.documents_in += rows
        counts.characters_in += characters
        counts.bytes_in += text_bytes


def extract_file(
    folder: Path,
    stage: str,
    number: int,
    file: RawFile,
    settings: ExtractConfig,
    fields: FieldsConfig,
) -> TaskResult:
    """Turn one raw file into document shards of at most ``settings.shard_bytes`` of text."""
    sink = Sink(folder=folder, stage=stage, source=file.source, name=f"{file.source}-{number:05d}")
    kept: list[Document] = []
    dropped: list[tuple[Document, str]] = []
    quarantined: list[dict[str, object]] = []
    pending = 0
    for item in _read(file, fields):
        if isinstance(item, Unreadable):
            quarantined.append({"file": file.name, **item._asdict()})
            continue
        document, reason = item
        size, characters = text_size([document.text])
        sink.count_in(1, characters, size)
        if not reason and not document.text.strip():
            reason = "extract.empty"
        if not reason and characters > settings.max_characters:
            reason = "extract.too_long"
        if reason:
            dropped.append((document, reason))
            continue
        kept.append(document)
        pending += size
        if pending >= settings.shard_bytes:
            _flush(sink, kept)
            kept, pending = [], 0
    _flush(sink, kept)
    sink.write_dropped(to_table([d for d, _ in dropped]), [r for _, r in dropped])
    _write_quarantined(sink, quarantined)
    return sink.result


def _flush(sink: Sink, kept: list[Document]) -> None:
    sink.write_kept(to_table(kept), f"{sink.name}-{len(sink.result.shards):03d}")


def _write_quarantined(sink: Sink, entries: list[dict[str, object]]) -> None:
    if not entries:
        return
    content = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
    name = f"quarantined/{sink.name}.jsonl"
    write_durably(sink.folder / name, content)
    sink.result.files[name] = digest_of(content)
    sink.result.counts.documents_in += len(entries)
    sink.result.counts.quarantined["extract.unreadable"] = len(entries)


def _read(file: RawFile, fields: FieldsConfig) -> Iterator[tuple[Document, str] | Unreadable]:
    """Yield (document, reason to drop it or nothing) for every record of a raw file."""
    if file.format != "warc":
        for item in read_text_file(file, fields):
            yield item if isinstance(item, Unreadable) else (item, "")
        return
    for record in read_warc(Path(file.path)):
        if isinstance(record, Damaged):
            yield Unreadable(*record)
        else:
            yield _from_record(file, record)


def _from_record(file: RawFile, record: Record) -> tuple[Document, str]:
    """Extract one page; (document, reason to drop it or nothing)."""
    text, reason, extractor = "", "", NO_EXTRACTOR
    if record.status != 200:
        reason = "extract.http_status"
    else:
        extracted = payload_text(record.payload, record.content_type)
        if isinstance(extracted, Dropped):
            reason = extracted.reason
        else:
            text, extractor = extracted.text, extracted.extractor
    key = (record.record_id,) if record.record_id else (file.sha256, str(record.offset))
    document = Document(
        id=document_id(file.source, *key),
        source=file.source,
        text=text,
        url=record.url,
        timestamp=record.timestamp,
        source_file_id=file.sha256,
        member_offset=record.offset,
        member_length=record.length,
        payload_sha256=hashlib.sha256(record.payload).hexdigest(),
        extractor=extractor,
        extracted_sha256=hashlib.sha256(text.encode()).hexdigest(),
        edits=identity(text),
    )
    return document, reason


def check_unique(files: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """Raise DataError if an id stands twice in a source; ``files`` are (source, name, ids)."""
    seen: dict[str, set[bytes]] = {}
    for source, name, ids in files:
        known = seen.setdefault(source, set())
        for document in ids:
            key = bytes.fromhex(document)
            if key in known:
                raise DataError(
                    f"source {source} holds the record {document} twice (again in {name}); the "
                    "same content stands in its input twice, or id_field "
                    "(pipeline.fields.id in a run) names a field that is not unique"
                )
            known.add(key)


def apply_steps(
    folder: Path, stage: str, out: str, shard: Shard, steps: Sequence[StepSpec]
) -> TaskResult:
    """Run steps over the documents of one shard."""
    sink = Sink(folder=folder, stage=stage, source=shard.source, name=Path(shard.path).stem)
    documents = read_documents(Path(out), shard)
    sink.count_in(len(documents), shard.text_characters, shard.text_bytes)
    built = [build_step(spec) for spec in steps]
    kept: list[Document] = []
    dropped: list[tuple[Document, str]] = []
    for document in documents:
        after, reason, counts = judge(document, built)
        if reason:
            dropped.append((document, reason))
        else:
            kept.append(after)
            sink.result.counts.add(counts)
    sink.write_kept(to_table(kept))
    sink.write_dropped(to_table([d for d, _ in dropped]), [r for _, r in dropped])
    return sink.result


def judge(document: Document, steps: Sequence[Step]) -> tuple[Document, str, Counts]:
    """Run steps over one document: (what is left, reason to drop it or nothing, edits counted).

    A step sees the text as if nobody had edited it before, so that its own runs can be checked.
    """
    counts = Counts()
    current = document
    for step in steps:
        verdict = step(replace(current, edits=identity(current.text)))
        if isinstance(verdict, Dropped):
            return current, verdict.reason, Counts()
        after = verdict.document
        count_edit(counts, step.name, current.text, after.text, after.edits, verdict.deleted)
        edits = compose(after.edits, current.edits) if after.text != current.text else current.edits
        current = replace(after, edits=edits)
    return current, "", counts


def count_edit(
    counts: Counts, rule: str, before: str, after: str, runs: Sequence[Run], deleted: dict[str, int]
) -> None:
    """Count an edit after proving it from its runs.

    Raises:
        ConservationError: a run does not stand in both texts, or the deletions do not add up.
    """
    final_end = origin_end = covered = 0
    for final, origin, length in runs:
        same = after[final : final + length] == before[origin : origin + length]
        if not same or final < final_end or origin < origin_end or length <= 0:
            raise ConservationError(
                f"{rule}: run {(final, origin, length)} does not stand in both texts"
            )
        final_end, origin_end, covered = final + length, origin + length, covered + length
    if sum(deleted.values()) != len(before) - covered:
        raise ConservationError(
            f"{rule}: its runs leave out {len(before) - covered} characters, its rules say "
            f"{sum(deleted.values())}"
        )
    counts.inserted += len(after) - covered
    for name, characters in deleted.items():
        counts.deleted[name] = counts.deleted.get(name, 0) + characters
