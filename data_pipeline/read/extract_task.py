"""The task that reads one raw file and writes documents.

Every record that is read goes out to ``documents/``, to ``dropped/`` with its reason, or, where it
could not be read at all, to ``quarantined/`` with its place in the raw file. The task holds a few
megabytes of text and one record, whatever the size of the file and however many pages are dropped.

    result = extract_file(folder, "00-extract", 0, file, ExtractConfig(), FieldsConfig())
"""

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import blake3
import numpy as np
import numpy.typing as npt

from data_pipeline.config.extract import ExtractConfig, FieldsConfig
from data_pipeline.document import Document, identity
from data_pipeline.manifest import TaskResult
from data_pipeline.read.extract import NO_EXTRACTOR, Extracted, PageExtractor, payload_text
from data_pipeline.read.extractors import page_extractor
from data_pipeline.read.inputs import ROW_FORMATS, RawFile, document_id
from data_pipeline.read.pages import Page, read_pages
from data_pipeline.read.rows import Unreadable, read_text_file
from data_pipeline.read.storage import local_copy
from data_pipeline.read.warc import Damaged, Record, read_warc
from data_pipeline.shards import text_size, to_table
from data_pipeline.sink import Sink
from data_pipeline.step import Dropped
from llmtrain.errors import DataError

BATCH_BYTES = 4 << 20
"""Text that is gathered before it is written."""
_DOCUMENT_BYTES = 1 << 10
"""What a document without text is taken to weigh."""


@dataclass(kw_only=True)
class _Batches:
    """Gathers documents and hands them to the sink a few megabytes at a time."""

    sink: Sink
    shard_bytes: int
    kept: list[Document] = field(default_factory=list)
    dropped: list[Document] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    _kept_bytes: int = 0
    _dropped_bytes: int = 0
    _shard_bytes: int = 0

    def keep(self, document: Document, size: int) -> None:
        """Take a document of ``size`` bytes of text that goes on; it may fill its shard."""
        self.kept.append(document)
        self._shard_bytes += size
        self._kept_bytes += size + _DOCUMENT_BYTES
        full = self._shard_bytes >= self.shard_bytes
        if full or self._kept_bytes >= BATCH_BYTES:
            self._write_kept()
        if full:
            self._shard_bytes = 0

    def drop(self, document: Document, reason: str, size: int) -> None:
        """Take a document that stops here."""
        self.dropped.append(document)
        self.reasons.append(reason)
        self._dropped_bytes += size + _DOCUMENT_BYTES
        if self._dropped_bytes >= BATCH_BYTES:
            self._write_dropped()

    def flush(self) -> None:
        """Write what has been gathered."""
        self._write_kept()
        self._write_dropped()

    def _write_kept(self) -> None:
        self.sink.write_kept(to_table(self.kept))
        self.kept, self._kept_bytes = [], 0

    def _write_dropped(self) -> None:
        self.sink.write_dropped(to_table(self.dropped), self.reasons)
        self.dropped, self.reasons, self._dropped_bytes = [], [], 0


@dataclass(kw_only=True)
class _Quarantine:
    """Writes what could not be read to ``quarantined/NAME.jsonl``; no file for none."""

    sink: Sink
    file: IO[bytes] | None = None
    digest: blake3.blake3 = field(default_factory=blake3.blake3)

    def add(self, file: RawFile, item: Unreadable) -> None:
        """Note one record and count it."""
        if self.file is None:
            path = self.sink.folder / self.name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("wb")
        line = (json.dumps({"file": file.name, **item._asdict()}) + "\n").encode()
        self.file.write(line)
        self.digest.update(line)
        counts = self.sink.result.counts
        counts.documents_in += item.records
        lost = counts.quarantined.get("extract.unreadable", 0)
        counts.quarantined["extract.unreadable"] = lost + item.records

    @property
    def name(self) -> str:
        return f"quarantined/{self.sink.name}.jsonl"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Make the file durable and hand it to the result."""
        if self.file is None:
            return
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.sink.result.files[self.name] = self.digest.hexdigest(length=16)


def extract_file(
    folder: Path,
    stage: str,
    number: int,
    file: RawFile,
    settings: ExtractConfig,
    fields: FieldsConfig,
) -> TaskResult:
    """Turn one raw file into document shards of at most ``settings.shard_bytes`` of text.

    Raises:
        DataError: the file is no longer what it was, or is damaged beyond single records.
    """
    sink = Sink(
        folder=folder, stage=stage, source=file.source, name=f"{file.source}-{number:05d}",
        shard_bytes=settings.shard_bytes,
    )  # fmt: skip
    batches = _Batches(sink=sink, shard_bytes=settings.shard_bytes)
    with (
        closing(_READERS[file.format](file, settings, fields, folder)) as items,
        _Quarantine(sink=sink) as quarantine,
    ):
        for item in items:
            if isinstance(item, Unreadable):
                quarantine.add(file, item)
                continue
            document, reason = item
            size, characters = text_size([document.text])
            sink.count_in(1, characters, size)
            if not reason and not document.text.strip():
                reason = "extract.empty"
            if not reason and characters > settings.max_characters:
                reason = "extract.too_long"
            if reason:
                batches.drop(document, reason, size)
            else:
                batches.keep(document, size)
    batches.flush()
    return sink.close()


def extract_settings(settings: ExtractConfig, fields: FieldsConfig) -> dict[str, Any]:
    """Return what a manifest says of extraction: settings, and what makes text of HTML.

    Raises:
        ImportError: the extractor is not installed.
    """
    with page_extractor(settings) as extractor:
        made = asdict(extractor.extractor)
    return {"extract": asdict(settings), "fields": asdict(fields), "extractor": made}


_Items = Generator[tuple[Document, str] | Unreadable]
"""Documents with the reason to drop them or nothing, and what could not be read."""


def _read_rows(
    file: RawFile, settings: ExtractConfig, fields: FieldsConfig, folder: Path
) -> _Items:
    for item in read_text_file(file, fields, settings.max_record_bytes, folder):
        yield item if isinstance(item, Unreadable) else (item, "")


def _read_crawl(
    file: RawFile, settings: ExtractConfig, fields: FieldsConfig, folder: Path
) -> _Items:
    with local_copy(file.path, folder, file.sha256) as path, page_extractor(settings) as extractor:
        for record in read_warc(path, settings.max_record_bytes):
            if isinstance(record, Damaged):
                yield Unreadable(*record)
            else:
                yield _from_record(file, record, settings, extractor)


def _read_folder(
    file: RawFile, settings: ExtractConfig, fields: FieldsConfig, folder: Path
) -> _Items:
    with page_extractor(settings) as extractor:
        for page in read_pages(file, settings.max_record_bytes):
            if isinstance(page, Unreadable):
                yield page
            else:
                yield _from_page(file, page, settings, extractor)


_READERS: dict[str, Callable[[RawFile, ExtractConfig, FieldsConfig, Path], _Items]] = {
    "warc": _read_crawl,
    "pages": _read_folder,
    **dict.fromkeys(ROW_FORMATS, _read_rows),
}
"""Format of a raw file -> what reads it."""


def _from_record(
    file: RawFile, record: Record, settings: ExtractConfig, extractor: PageExtractor
) -> tuple[Document, str]:
    """Extract one page of a crawl."""
    extracted = (
        payload_text(record.payload, record.content_type, record.url, extractor, settings.max_tags)
        if record.status == 200
        else Dropped("extract.http_status")
    )
    key = (record.record_id,) if record.record_id else (file.sha256, str(record.offset))
    document = Document(
        id=document_id(file.source, *key),
        source=file.source,
        text="",
        url=record.url,
        timestamp=record.timestamp,
        source_file_id=file.sha256,
        member_offset=record.offset,
        member_length=record.length,
        payload_sha256=hashlib.sha256(record.payload).hexdigest(),
    )
    return _with_text(document, extracted)


def _from_page(
    file: RawFile, page: Page, settings: ExtractConfig, extractor: PageExtractor
) -> tuple[Document, str]:
    """Extract one page of a folder."""
    extracted = (
        Dropped("extract.not_text")
        if page.is_binary
        else payload_text(
            page.payload, page.kind.content_type, page.url, extractor, settings.max_tags
        )
    )
    document = Document(
        id=document_id(file.source, page.name, page.sha256),
        source=file.source,
        text="",
        url=page.url,
        source_file_id=page.sha256,
        member_length=len(page.payload),
        payload_sha256=page.sha256,
        metadata=page.metadata,
    )
    return _with_text(document, extracted)


def _with_text(document: Document, extracted: Extracted | Dropped) -> tuple[Document, str]:
    """Return the document with its text, and the reason to drop it or nothing."""
    text, reason, extractor, metadata = "", "", NO_EXTRACTOR, document.metadata
    if isinstance(extracted, Dropped):
        reason = extracted.reason
    else:
        text, extractor = extracted.text, extracted.extractor
        metadata = {**metadata, **extracted.metadata}
    return replace(
        document,
        text=text,
        extractor=extractor,
        extracted_sha256=hashlib.sha256(text.encode()).hexdigest(),
        edits=identity(text),
        metadata=metadata,
    ), reason


def check_unique(files: Iterable[tuple[str, str, Sequence[str]]]) -> None:
    """Raise DataError if an id stands twice in a source; ``files`` are (source, name, ids).

    Takes 16 bytes a document, and as much again for the largest source while it is sorted.
    """
    ids: dict[str, list[npt.NDArray[np.uint64]]] = {}
    names: dict[str, list[str]] = {}
    for source, name, found in files:
        halves = np.frombuffer(bytes.fromhex("".join(found)), dtype=">u8").astype(np.uint64)
        ids.setdefault(source, []).append(halves.reshape(-1, 2))
        names.setdefault(source, []).append(name)
    for source, parts in ids.items():
        place = _second_of_two(np.concatenate(parts))
        if place is None:
            continue
        ends = np.cumsum([len(part) for part in parts])
        number = int(np.searchsorted(ends, place, side="right"))
        high, low = parts[number][place - (ends[number] - len(parts[number]))].tolist()
        raise DataError(
            f"source {source} holds the record {high:016x}{low:016x} twice (again in "
            f"{names[source][number]}); the same content stands in its input twice, or id_field "
            "(pipeline.fields.id in a run) names a field that is not unique"
        )


def _second_of_two(ids: npt.NDArray[np.uint64]) -> int | None:
    """Return the first row of [rows, 2] that is equal to one before it, if any is."""
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: equal rows stay in their order
    equal = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
    return int(order[1:][equal].min()) if equal.any() else None
