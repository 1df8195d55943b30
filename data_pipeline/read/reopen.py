"""Reopen the raw record behind a document of a token store, and make its text again.

A record is proven when it stands at its place in the raw file under its id, its payload has the
noted sha256, the noted extractor of the noted version is the one installed, and the text that it
makes has the noted sha256. A conversation is proven by its payload: its text is a template's. What
differs is said; nothing is taken on trust.

    with Reopener(files, PipelineConfig()) as reopener:
        for answer in reopener.reopen(requests): ...
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, cast, get_args

from data_pipeline.chat.rows import EXTRACTOR as CONVERSATIONS
from data_pipeline.chat.rows import chat_rows, payload_digest
from data_pipeline.config.extract import (
    ExtractConfig,
    ExtractorName,
    FieldsConfig,
    TrafilaturaConfig,
)
from data_pipeline.document import Extractor
from data_pipeline.read.extract import NO_EXTRACTOR, PageExtractor, Resiliparse, payload_text
from data_pipeline.read.extractors import page_extractor
from data_pipeline.read.inputs import ROW_FORMATS, RawFile, document_id, find_raw_files
from data_pipeline.read.page_kinds import page_kind
from data_pipeline.read.raw_files import RawFiles
from data_pipeline.read.rows import Unreadable, read_text_file
from data_pipeline.read.storage import local_copy, open_bytes
from data_pipeline.read.warc import Damaged, read_member
from data_pipeline.step import Dropped
from llmtrain.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A document whose record is asked for; all but ``spans`` is what the token store keeps."""

    id: str
    """Id of the document."""
    source: str
    """Source it belonged to when it was read; ids are made of it."""
    source_file_id: str
    """sha256 hex of the raw file."""
    member_offset: int
    """Byte offset of the record in the file, or number of its line or row."""
    member_length: int
    """Bytes of the record in the file."""
    payload_sha256: str
    """sha256 hex of what was extracted."""
    extracted_sha256: str
    """sha256 hex of the text it gave."""
    extractor: Extractor = NO_EXTRACTOR
    """What made the text."""
    url: str = ""
    """Address; names the file of a page that was a file of its own."""
    spans: tuple[tuple[int, int], ...] = ()
    """Characters [start, end) of the extracted text that are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What reopening one record gave."""

    problem: str = ""
    """What is not as it was, or nothing: then the record is proven."""
    file: str = ""
    """Raw file that was opened."""
    texts: tuple[str, ...] = ()
    """The wanted spans of the text that was extracted again, where it is the same."""


class _Payload(NamedTuple):
    """A record as its file holds it."""

    content: bytes
    content_type: str
    url: str


class _DiffersError(Exception):
    """A record is not as it was; the message says how."""


@dataclass(kw_only=True)
class Reopener:
    """Reopens records of one pipeline's folder; extractors are started once."""

    files: RawFiles
    """Where the raw files lie."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    """Fields of rows that the pipeline read."""
    max_record_bytes: int = ExtractConfig().max_record_bytes
    """Longest line the pipeline read."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _extractors: dict[Extractor, PageExtractor] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def reopen(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Answer]]:
        """Yield every document that is asked for with its answer; a raw file is opened once."""
        by_file: dict[tuple[str, str], dict[str, Request]] = {}
        for request in requests:
            place = (request.source, request.source_file_id)
            by_file.setdefault(place, {})[request.id] = request
        for (_, sha256), left in by_file.items():
            problem = "its raw file holds no such record"
            try:
                for request, answer in self._of_file(sha256, list(left.values())):
                    del left[request.id]
                    yield request, answer
            except (DataError, OSError) as error:
                problem = str(error)
            yield from ((request, Answer(problem=problem)) for request in left.values())

    def _of_file(
        self, sha256: str, requests: Sequence[Request]
    ) -> Iterator[tuple[Request, Answer]]:
        """Answer the requests of one raw file."""
        first = requests[0]
        if not self.files.is_noted(sha256) and first.url.startswith("file:///"):
            for one in requests:
                path = self.files.find_page(sha256, one.member_length, one.source, one.url)
                yield one, self._answer(path, one, _page(path, one))
            return
        path = self.files.find(sha256)
        file = _raw_file(path, first.source, sha256)
        if file.format in ROW_FORMATS:
            yield from self._of_rows(file, requests)
            return
        with local_copy(path, None, sha256) as local:
            members: dict[int, list[Request]] = {}
            for request in sorted(requests, key=lambda request: request.member_offset):
                members.setdefault(request.member_offset, []).append(request)
            for group in members.values():
                yield from self._of_member(file, local, group)

    def _of_member(
        self, file: RawFile, local: Path, requests: Sequence[Request]
    ) -> Iterator[tuple[Request, Answer]]:
        """Answer requests whose records stand in one member of a crawl, nearly always one."""
        offset, problem = requests[0].member_offset, "no page is there"
        wanted = {request.id: request for request in requests}
        for record in read_member(local, offset, requests[0].member_length):
            if isinstance(record, Damaged):
                problem = record.reason
                continue
            problem = "the page there has another id"
            key = (record.record_id,) if record.record_id else (file.sha256, str(record.offset))
            request = wanted.pop(document_id(requests[0].source, *key), None)
            if request is not None:
                payload = _Payload(record.payload, record.content_type, record.url)
                yield request, self._answer(file.path, request, payload)
        for request in wanted.values():
            yield request, Answer(file=file.path, problem=f"{file.path} at {offset:,}: {problem}")

    def _of_rows(
        self, file: RawFile, requests: Sequence[Request]
    ) -> Iterator[tuple[Request, Answer]]:
        """Read a table or a file of lines up to the last row that is asked for."""
        wanted = {request.id: request for request in requests}
        last = max(request.member_offset for request in requests)
        if requests[0].extractor.name == CONVERSATIONS:
            yield from self._of_conversations(file, requests, last)
            return
        for item in read_text_file(file, self.fields, self.max_record_bytes):
            if isinstance(item, Unreadable):
                continue
            if item.member_offset > last:
                return
            request = wanted.get(item.id)
            if request is not None and request.member_offset == item.member_offset:
                yield request, self._answer(file.path, request, item.text)

    def _of_conversations(
        self, file: RawFile, requests: Sequence[Request], last: int
    ) -> Iterator[tuple[Request, Answer]]:
        """Compare what was read of rows that hold conversations."""
        wanted = {request.member_offset: request for request in requests}
        for row in chat_rows(file):
            if row.ordinal > last:
                return
            request = wanted.get(row.ordinal)
            if request is not None and isinstance(row.values, dict):
                found, noted = payload_digest(row.values), request.payload_sha256
                said = f"the conversation has sha256 {found[:16]}, noted is {noted[:16]}"
                yield request, Answer(file=file.path, problem="" if found == noted else said)

    def _answer(self, path: str, request: Request, held: _Payload | str) -> Answer:
        """Make the text of a record again, or take the text it holds; cut out what is wanted."""
        try:
            text = held if isinstance(held, str) else self._text(held, request)
            _compare("the text extracted now", text.encode(), request.extracted_sha256)
        except _DiffersError as error:
            return Answer(file=path, problem=str(error))
        return Answer(file=path, texts=tuple(text[start:end] for start, end in request.spans))

    def _text(self, payload: _Payload, request: Request) -> str:
        """Extract a payload again."""
        _compare("the payload", payload.content, request.payload_sha256)
        extractor = self._extractor(request.extractor)
        made = payload_text(
            payload.content, payload.content_type, payload.url, extractor, max_tags=sys.maxsize
        )
        if isinstance(made, Dropped):
            raise _DiffersError(f"no text came of it this time: {made.reason}")
        return made.text

    def _extractor(self, wanted: Extractor) -> PageExtractor:
        """Return the extractor that made a text, started once."""
        if wanted not in self._extractors:
            self._extractors[wanted] = self._start(wanted)
        return self._extractors[wanted]

    def _start(self, wanted: Extractor) -> PageExtractor:
        if wanted.name == NO_EXTRACTOR.name:
            return Resiliparse()  # asked for nothing: the payload is text
        made = self._stack.enter_context(page_extractor(_settings_of(wanted)))
        now = made.extractor
        if now.version != wanted.version:
            raise _DiffersError(
                f"its text was made by {wanted.name} {wanted.version}, installed is "
                f"{now.version}; install the former to make it again"
            )
        if now != wanted:
            raise _DiffersError(
                f"its text was made with {wanted.options}, what is installed uses {now.options}"
            )
        return made


def _compare(what: str, content: bytes, sha256: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise _DiffersError(f"{what} has sha256 {digest[:16]}, noted is {sha256[:16]}")


def _page(path: str, request: Request) -> _Payload:
    """Read a page that is a file of its own."""
    kind = page_kind(PurePosixPath(request.url).name)
    with open_bytes(path) as stream:
        return _Payload(stream.read(), kind.content_type if kind else "", request.url)


def _settings_of(extractor: Extractor) -> ExtractConfig:
    """Return the settings that make an extractor."""
    if extractor.name not in get_args(ExtractorName):
        raise _DiffersError(
            f"its text was made by {extractor.name} {extractor.version}, which is not known here"
        )
    name = cast(ExtractorName, extractor.name)
    if name == "resiliparse":
        return ExtractConfig()
    options: dict[str, Any] = json.loads(extractor.options)
    options = options.get("trafilatura", options)
    favor: Literal["balanced", "precision", "recall"] = "balanced"
    if options["favor_precision"] or options["favor_recall"]:
        favor = "precision" if options["favor_precision"] else "recall"
    trafilatura = TrafilaturaConfig(favor=favor, tables=options["include_tables"])
    return ExtractConfig(extractor=name, trafilatura=trafilatura)


def _raw_file(path: str, source: str, sha256: str) -> RawFile:
    (file,) = find_raw_files({source: path}, key="raw")
    if file.format not in ("warc", *ROW_FORMATS):
        raise DataError(f"{path} is no file of records; give raw=DIR where the input lies")
    return RawFile(source=source, path=path, format=file.format, sha256=sha256)
