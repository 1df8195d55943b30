"""What is known of the documents in the rows of a step: record, text, the way back to the crawl.

Every record and every text is read once, however many stretches of a document there are; records
are read a row group at a time.

    seen = look(run, step_content(run.plan, 11))
    seen[0].record.url, seen[0].characters, seen[0].runs
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmtrain.data.lineage import DocumentRecord, text_span
from llmtrain.data.trace import Stretch, rows_of
from llmtrain.trace.run import TracedRun


class DocumentKey(NamedTuple):
    """Which document of which source."""

    source: int
    """Index of the source in the plan."""
    document: int
    """Document of its store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownDocument:
    """A document of a store."""

    key: DocumentKey
    """Which it is."""
    source: str
    """Name of its source in the run."""
    tokens: tuple[int, ...]
    """Its ids, EOS left out."""
    num_tokens: int
    """Its tokens, EOS included where it has one."""
    record: DocumentRecord | None
    """Where it came from; None in a store of another program."""
    text: str | None
    """Its text; None without a tokenizer."""
    problem: str
    """Why spans of the text cannot be told from its tokens, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One stretch of a document in a row of a step."""

    stretch: Stretch
    """Where it stands."""
    document: KnownDocument
    """What it is of."""
    rank: int | None
    """Data-parallel rank that had the row; None where their number is not known."""
    micro_batch: int | None
    """Which micro-batch of that rank."""
    characters: tuple[int, int] | None
    """Characters [start, end) of the final text; None without a tokenizer."""
    runs: tuple[tuple[int, int, int], ...]
    """Which of them stand in the extracted text: (final_start, extracted_start, length)."""

    @property
    def text(self) -> str | None:
        """Text of its tokens; a character that is cut is whole."""
        if self.characters is None or self.document.text is None:
            return None
        return self.document.text[slice(*self.characters)]

    @property
    def bytes(self) -> tuple[int, int] | None:
        """Bytes [start, end) of the final text as UTF-8."""
        if self.characters is None or self.document.text is None:
            return None
        start = len(self.document.text[: self.characters[0]].encode())
        return start, start + len((self.text or "").encode())

    @property
    def num_inserted(self) -> int:
        """Characters that a rule put in: they stand in no extracted text."""
        if self.characters is None or self.document.record is None:
            return 0
        return self.characters[1] - self.characters[0] - sum(length for *_, length in self.runs)


def look(run: TracedRun, stretches: Iterable[Stretch]) -> list[Seen]:
    """Return what is known of some stretches, in their order."""
    stretches = list(stretches)
    keys = {DocumentKey(s.source, s.document) for s in stretches}
    documents = documents_of(run, sorted(keys))
    return [_seen(run, s, documents[DocumentKey(s.source, s.document)]) for s in stretches]


def documents_of(run: TracedRun, keys: Sequence[DocumentKey]) -> dict[DocumentKey, KnownDocument]:
    """Return what is known of some documents."""
    found: dict[DocumentKey, KnownDocument] = {}
    for source, name in enumerate(run.plan.source_names):
        own = [key.document for key in keys if key.source == source]
        records = _records(run, source, own)
        for number in own:
            key = DocumentKey(source, number)
            found[key] = _known(run, key, name, records.get(number))
    return found


def _records(run: TracedRun, source: int, own: Sequence[int]) -> Mapping[int, DocumentRecord]:
    """Records of documents of a source; none where another program wrote the store."""
    ours = [d for d in own if run.has_records(source, d)]
    return run.store(source).records(ours)


def _known(
    run: TracedRun, key: DocumentKey, name: str, record: DocumentRecord | None
) -> KnownDocument:
    store = run.store(key.source)
    ids = store.document(key.document).tolist()
    eos_id = None if store.manifest is None else store.manifest.eos_id
    if eos_id is None and run.tokenizer is not None:
        eos_id = run.tokenizer.eos_id
    plain = ids[:-1] if ids[-1] == eos_id else ids
    text = None if run.tokenizer is None else run.tokenizer.decode(plain)
    problem = ""
    if text is not None and record is not None and len(text.encode()) != record.text_bytes:
        problem = (
            f"its tokens decode to {len(text.encode()):,} bytes, its text had "
            f"{record.text_bytes:,}: the tokenizer does not keep every character"
        )
    return KnownDocument(
        key=key,
        source=name,
        tokens=tuple(plain),
        num_tokens=len(ids),
        record=record,
        text=text,
        problem=problem,
    )


def _seen(run: TracedRun, stretch: Stretch, document: KnownDocument) -> Seen:
    characters, runs = None, list[tuple[int, int, int]]()
    if run.tokenizer is not None:
        start, end = (min(token, len(document.tokens)) for token in stretch.tokens)
        characters = text_span(document.tokens, start, end, run.tokenizer.decode)
        if document.record is not None and not document.problem:
            runs = document.record.runs(*characters)
    rank, micro_batch = _place(run, stretch)
    return Seen(
        stretch=stretch, document=document, rank=rank, micro_batch=micro_batch,
        characters=characters, runs=tuple(runs),
    )  # fmt: skip


def _place(run: TracedRun, stretch: Stretch) -> tuple[int | None, int | None]:
    """Data-parallel rank and micro-batch of a row."""
    shape = rows_of(run.plan, stretch.step)
    share = run.rows_per_rank(shape)
    if share is None:
        return None, None
    rank, row = divmod(stretch.row, share)
    return rank, row // (run.config.training.micro_batch_size * shape.rows_per_unit)


def plain(seen: Seen, *, with_text: bool) -> dict[str, Any]:
    """Return one stretch as JSON can hold it; steps and epochs count from 1."""
    stretch, document, record = seen.stretch, seen.document, seen.document.record
    found: dict[str, Any] = {
        "step": stretch.step + 1, "row": stretch.row, "rank": seen.rank,
        "micro_batch": seen.micro_batch, "inputs": list(stretch.inputs),
        "source": document.source, "epoch": stretch.epoch + 1, "window": stretch.window,
        "document": stretch.document, "tokens": list(stretch.tokens),
        "num_tokens": document.num_tokens,
    }  # fmt: skip
    if record is not None:
        found |= {
            "id": record.id, "url": record.url, "language": record.language,
            "cluster": record.cluster,
            "extractor": f"{record.extractor_name} {record.extractor_version}".strip(),
            "source_file_id": record.source_file_id, "member_offset": record.member_offset,
            "member_length": record.member_length,
        }  # fmt: skip
    if seen.characters is not None:
        found |= {"characters": list(seen.characters), "bytes": list(seen.bytes or ())}
    if seen.characters is not None and record is not None:
        spans = [[origin, origin + length] for _, origin, length in seen.runs]
        found |= {"extracted": spans, "inserted": seen.num_inserted}
    if with_text:
        found["text"] = seen.text
    return found
