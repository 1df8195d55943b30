"""Find the documents of a run by address or id: only those two columns of the stores are read.

find(run, url="https://docs.example/a")    # [DocumentKey(source=0, document=7)]
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmtrain.data.store import TokenStore, open_source
from llmtrain.errors import DataError
from llmtrain.trace.documents import DocumentKey
from llmtrain.trace.run import TracedRun, has_records

_MOST_FOUND = 100
"""Documents told at once."""
_MOST_NEAR = 3
"""Addresses named where none is found."""
_MOST_COMPARED = 20_000
"""Addresses of the same host that are compared with the one asked for."""


def find(run: TracedRun, *, url: str | None = None, doc: str | None = None) -> list[DocumentKey]:
    """Return the documents of the training stores with an address or an id.

    An address is compared without its scheme, ``www.`` and a slash at its end; an id may be cut.

    Raises:
        DataError: there is none (says what is near, or that it is held out), or too many.
    """
    stores = {source: run.store(source) for source in range(len(run.plan.orders))}
    found = [
        DocumentKey(source, number)
        for source, store in stores.items()
        for number in _matches(store, url, doc)
    ]
    if not found:
        raise DataError(_not_found(run, stores, url, doc))
    if len(found) > _MOST_FOUND:
        raise DataError(
            f"{len(found):,} documents have {_what(url, doc)}; give more of it, so that at most "
            f"{_MOST_FOUND} are left"
        )
    return found


def _matches(store: TokenStore, url: str | None, doc: str | None) -> Iterator[int]:
    """Yield the documents of a store that are asked for."""
    column, key = ("id", doc or "") if url is None else ("url", _key(url))
    for first, values in _columns(store, column):
        near = pc.indices_nonzero(pc.match_substring(values, key)).to_pylist()
        for row in near:
            value = values[row].as_py()
            if value.startswith(key) if url is None else _key(value) == key:
                yield first + row


def _columns(store: TokenStore, column: str) -> Iterator[tuple[int, Any]]:
    """Yield (first document, values) of every row group of a store that has records."""
    first = 0
    for number, num_documents in enumerate(store.shards.num_documents):
        if has_records(store, first):
            with pq.ParquetFile(store.records_path(number)) as file:
                start = first
                for group in range(file.num_row_groups):
                    values = file.read_row_group(group, columns=[column]).column(column)
                    yield start, values
                    start += len(values)
        first += num_documents


def _key(url: str) -> str:
    """What two addresses of one page have in common."""
    rest = url.partition("://")[2] or url
    return rest.removeprefix("www.").rstrip("/")


def _not_found(
    run: TracedRun, stores: Mapping[int, TokenStore], url: str | None, doc: str | None
) -> str:
    """Say that a document is in no store of the run, and what helps."""
    what = _what(url, doc)
    for name, paths in run.config.data.validation.items():
        with suppress(DataError):  # moved since; it says nothing then
            held_out = open_source(paths, run.config.data.cache_dir)
            if next(_matches(held_out, url, doc), None) is not None:
                return (
                    f"the document with {what} is held out: it is in data.validation.{name}, "
                    "which is never trained on"
                )
    total = sum(store.num_documents for store in stores.values())
    said = f"none of the {total:,} documents of the run has {what}"
    near = [] if url is None else _near(stores, url)
    if near:
        return f"{said}; near are {', '.join(near)}"
    if not any(run.has_records(source, 0) for source in stores):
        return f"{said}: its stores were written by another program and hold no records"
    return f"{said}; `llmtrain-data explain out=DIR` tells whether the pipeline dropped it"


def _what(url: str | None, doc: str | None) -> str:
    return f"the address {url}" if url is not None else f"an id that begins with {doc}"


def _near(stores: Mapping[int, TokenStore], url: str) -> list[str]:
    host = _key(url).partition("/")[0]
    same: list[str] = []
    for store in stores.values():
        for _, values in _columns(store, "url"):
            same += values.filter(pc.match_substring(values, host)).to_pylist()
            if len(same) >= _MOST_COMPARED:
                break
    return get_close_matches(url, sorted(set(same[:_MOST_COMPARED])), _MOST_NEAR, 0.6)
