"""Records of keyed deduplication: what makes two pages, texts, lines or spans one, and who stays.

A record is (key, order, place). Keys are 128-bit hashes; among equal keys the record with the
smallest order stays, and among equal orders the one that comes first in the corpus.

    records = KEYS["exact"].make(table, shard_index, first_row)
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import blake3
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.dedup.sorted_runs import Records
from data_pipeline.dedup.url import normalize_c4, url_digest
from data_pipeline.filters.c4 import line_key
from data_pipeline.text.sentence_spans import sentence_spans

RECORD = np.dtype([
    ("key_hi", "<u8"), ("key_lo", "<u8"), ("order_hi", "<u8"), ("order_lo", "<u8"),
    ("shard", "<u4"), ("row", "<u4"), ("line", "<u4"),
])  # fmt: skip
LAST_ORDER = (1 << 64) - 1


def age(timestamp: str) -> int:
    """Return a number that is smaller for newer times; the largest for none.

    A time without a zone is UTC, not that of the machine.
    """
    if not timestamp:
        return LAST_ORDER
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError:
        return LAST_ORDER
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return LAST_ORDER - 1 - max(0, round(moment.timestamp() * 1_000_000))


def page_order(url: str, document_id: str) -> bytes:
    """Return the rank of a page among those that share a line: md5 of its normalised address."""
    return bytes.fromhex(url_digest(normalize_c4(url) if url else document_id))


def halves(digests: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """Return 16-byte digests as numbers, [N, 2]."""
    return np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)


def _records(
    keys: Sequence[bytes], orders: npt.NDArray[np.uint64], shard: int, rows: Any, lines: Any = 0
) -> Records:
    """Put records together; ``orders`` is [N, 2]."""
    records = np.zeros(len(keys), RECORD)
    for name, numbers in (("key", halves(keys)), ("order", orders)):
        records[f"{name}_hi"], records[f"{name}_lo"] = numbers[:, 0], numbers[:, 1]
    records["shard"], records["row"], records["line"] = shard, rows, lines
    return records


def _columns(table: pa.Table, *names: str) -> list[list[Any]]:
    return [table.column(name).to_pylist() for name in names]


def url_records(table: pa.Table, shard: int, first: int) -> Records:
    """Key: the normalised address; the newest page stays. Pages without an address have no key."""
    urls, times = _columns(table, "url", "timestamp")
    rows = [row for row, url in enumerate(urls) if url]
    orders = np.zeros((len(rows), 2), np.uint64)
    orders[:, 0] = [age(times[row]) for row in rows]
    keys = [_hash(normalize_c4(urls[row])) for row in rows]
    return _records(keys, orders, shard, np.array(rows, np.uint32) + np.uint32(first))


def text_records(table: pa.Table, shard: int, first: int) -> Records:
    """Key: the text; the document with the smallest id stays."""
    texts, ids = _columns(table, "text", "id")
    orders = halves([bytes.fromhex(id_) for id_ in ids])
    rows = np.arange(first, first + len(texts))
    return _records([_hash(text) for text in texts], orders, shard, rows)


def line_records(table: pa.Table, shard: int, first: int) -> Records:
    """Key: the line without case and margins; it stays in the page with the smallest md5(url)."""

    def keys_of(text: str) -> list[tuple[int, bytes]]:
        return [(n, line_key(line)) for n, line in enumerate(text.split("\n")) if line.strip()]

    return _part_records(table, shard, first, keys_of)


def span_records(table: pa.Table, shard: int, first: int, sentences: int) -> Records:
    """Key: consecutive sentences without case and white space; the page stays as for lines.

    A span that overlaps an equal one before it in the same document has no record of its own.
    """

    def keys_of(text: str) -> list[tuple[int, bytes]]:
        return span_keys(text, sentences)

    return _part_records(table, shard, first, keys_of)


def span_keys(text: str, sentences: int) -> list[tuple[int, bytes]]:
    """Return (number of the first sentence, key) of every span that counts."""
    normal = [" ".join(text[start:end].lower().split()) for start, end in sentence_spans(text)]
    last: dict[bytes, int] = {}
    found = []
    for number in range(len(normal) - sentences + 1):
        joined = "\n".join(normal[number : number + sentences]).encode("utf-8", "surrogatepass")
        key = hashlib.md5(joined, usedforsecurity=False).digest()
        if number - last.get(key, -sentences) >= sentences:
            last[key] = number
            found.append((number, key))
    return found


def _part_records(
    table: pa.Table, shard: int, first: int, keys_of: Callable[[str], list[tuple[int, bytes]]]
) -> Records:
    """Records of numbered parts of texts, ordered by page, then by place."""
    texts, urls, ids = _columns(table, "text", "url", "id")
    parts = [keys_of(text) for text in texts]
    counts = [len(part) for part in parts]
    orders = halves([page_order(url, id_) for url, id_ in zip(urls, ids, strict=True)])
    rows = np.repeat(np.arange(first, first + len(texts)), counts)
    numbers = [number for part in parts for number, _ in part]
    keys = [key for part in parts for _, key in part]
    return _records(keys, np.repeat(orders, counts, axis=0), shard, rows, numbers)


def _hash(text: str) -> bytes:
    return blake3.blake3(text.encode("utf-8", "surrogatepass")).digest(length=16)


@dataclass(frozen=True, slots=True)
class KeyKind:
    """How a stage makes its records."""

    make: Callable[..., Records]
    """(table, shard, number of its first row, **options) -> records."""
    columns: tuple[str, ...]
    """Columns they are made from."""
    bytes_per_record: int
    """Text that gives a record, at least about this long; 0: one record per document."""


KEYS: dict[str, KeyKind] = {
    "url": KeyKind(url_records, ("url", "timestamp"), 0),
    "exact": KeyKind(text_records, ("text", "id"), 0),
    "line_dedup": KeyKind(line_records, ("text", "url", "id"), 40),
    "span_dedup": KeyKind(span_records, ("text", "url", "id"), 60),
}
"""By stage."""
