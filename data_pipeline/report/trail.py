"""Where one document went: its place in every finished stage, kept or dropped with its reason.

A shard of a stage is looked for under the name it had in the stage before, then everywhere. Only
the columns that are asked about are read, and digests are not compared: this is for looking, never
for making anything.

    ids = find_documents(record, url="https://example.org/a")
    trail = follow(record, ids[0])
    trail[-1].reason    # 'c4.few_sentences'
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.dedup.url import normalize_c4
from data_pipeline.document import Document
from data_pipeline.report.record import AFTER_STAGES, FolderRecord, StageRecord
from data_pipeline.shards import Shard, from_table
from llmtrain.data.lineage import DocumentRecord, iterate_records
from llmtrain.errors import DataError

_MOST = 5
"""Documents with the same address that are told of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A document in one stage."""

    stage: str
    """Folder of the stage."""
    shard: Shard
    """Shard it stands in."""
    document: Document
    """The document as that shard has it."""
    reason: str
    """Why it was dropped there, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A document in a token store."""

    store: str
    """Folder of the store, below the pipeline's."""
    part: str
    """Name of the part."""
    number: int
    """Position of the document in the part."""
    record: DocumentRecord
    """What the store keeps of it."""


def find_documents(
    record: FolderRecord, *, url: str | None = None, doc: str | None = None
) -> list[str]:
    """Return the ids of documents with an address (schemes and ``www.`` aside) or an id.

    Raises:
        DataError: no document was read that has it.
    """
    first = record.stages[0].manifest
    key = normalize_c4(url or "")
    column, text = ("url", _host(key)) if doc is None else ("id", doc)

    def fits(row: dict[str, str]) -> bool:
        return normalize_c4(row["url"]) == key if doc is None else row["id"].startswith(doc)

    found: list[str] = []
    for shard in (*first.shards, *first.dropped):
        for table in _scan(record.path, shard, ["id", "url"]):
            rows = table.filter(pc.match_substring(table.column(column), pattern=text))
            found += [row["id"] for row in rows.to_pylist() if fits(row)]
    if not found:
        what = f"the address {url}" if doc is None else f"an id that begins with {doc}"
        quarantined = sum(first.counts.quarantined.values())
        raise DataError(
            f"none of the {first.counts.documents_in - quarantined:,} documents read into "
            f"{record.path} has {what}; {quarantined:,} records could not be read (quarantined/ in "
            f"{first.stage})"
        )
    return sorted(set(found))[:_MOST]


def follow(record: FolderRecord, id_: str) -> list[Place]:
    """Return the document's place in every stage it came to, in their order."""
    places: list[Place] = []
    for stage in record.stages:
        if stage.kind in AFTER_STAGES[1:]:
            continue
        place = _find(record.path, stage, id_, places[-1].shard if places else None)
        if place is None:
            break
        places.append(place)
        if place.reason:
            break
    return places


def _find(out: Path, stage: StageRecord, id_: str, before: Shard | None) -> Place | None:
    shards = [*stage.manifest.shards, *stage.manifest.dropped]
    if before is not None:
        stem = Path(before.path).stem
        shards.sort(key=lambda shard: stem not in Path(shard.path).stem)
    for shard in shards:
        for group, table in enumerate(_scan(out, shard, ["id"])):
            row = pc.index(table.column("id"), id_).as_py()
            if row >= 0:
                whole = _group(out, shard, group).slice(row, 1)
                gone = "reason" in whole.column_names
                reason = whole.column("reason")[0].as_py() if gone else ""
                (document,) = from_table(whole)
                return Place(stage=stage.name, shard=shard, document=document, reason=reason)
    return None


def find_stored(record: FolderRecord, id_: str, source: str) -> Stored | None:
    """Return the document's place in the token stores, if it has one."""
    for store in record.stores:
        folder = record.path / "stores" / store.split / store.source
        for path in sorted(folder.glob("*.docs.parquet")) if store.source == source else ():
            for number, entry in enumerate(iterate_records(path)):
                if entry.id == id_:
                    part = path.name.removesuffix(".docs.parquet")
                    name = str(folder.relative_to(record.path))
                    return Stored(store=name, part=part, number=number, record=entry)
    return None


def find_winner(record: FolderRecord, place: Place) -> Document | None:
    """Return the document that stayed where this one was dropped as its duplicate."""
    stage = record.stage(place.stage.partition("-")[2])
    if stage is None or not place.reason.endswith(".duplicate"):
        return None
    gone = place.document
    for shard in stage.manifest.shards:
        for group, table in enumerate(_scan(record.path, shard, _LIKE.get(stage.kind, _CLUSTER))):
            for row in _like(table, gone, stage.kind):
                (document,) = from_table(_group(record.path, shard, group).slice(row, 1))
                if stage.kind != "exact" or document.text == gone.text:
                    return document
    return None


_CLUSTER = ["cluster"]
_LIKE = {"url": ["url"], "exact": ["text"]}
"""Stage -> what its duplicates have in common; a cluster, where none is given."""


def _like(table: pa.Table, gone: Document, kind: str) -> Sequence[int]:
    """Rows of documents that may be the one that stayed."""
    if kind == "url":
        key = normalize_c4(gone.url)
        match = pc.match_substring(table.column("url"), pattern=_host(key))
        urls = table.column("url").to_pylist()
        return [i for i in _rows(match) if normalize_c4(urls[i]) == key]
    if kind == "exact":
        lengths = pc.utf8_length(table.column("text"))
        return _rows(pc.equal(lengths, pa.scalar(len(gone.text), lengths.type)))
    return _rows(pc.equal(table.column("cluster"), gone.cluster)) if gone.cluster else []


def _host(key: str) -> str:
    """The part of a normalised address that stands in every address it is made from.

    What follows may have lost the scheme of an address inside it, as archives have them.
    """
    return key.partition("/")[0]


def _rows(mask: pa.ChunkedArray) -> list[int]:
    found: list[int] = pc.indices_nonzero(mask).to_pylist()
    return found


def _scan(out: Path, shard: Shard, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns of a shard, a row group at a time."""
    with _open(out, shard) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=list(columns))


def _group(out: Path, shard: Shard, group: int) -> pa.Table:
    with _open(out, shard) as file:
        return file.read_row_group(group)


def _open(out: Path, shard: Shard) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(out / shard.path)
    except FileNotFoundError:
        raise DataError(
            f"{out / shard.path} is missing; remove the stage's folder to make it again"
        ) from None
