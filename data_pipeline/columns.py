"""Pages as steps see them, out of the columns of a shard and back into them.

A step reads and changes a few fields of a document; only those become Python objects, and only a
column in which a step has changed something is made anew. The others stay as Arrow has them. A page
looks as if nobody had edited it before; its edits are chained to those of the document afterwards.

    pages = pages_of(table)
    with_pages(table, rows, [pages[row] for row in rows], judged, edits)
"""

import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.document import Document, EditMap, Run, compose, identity
from data_pipeline.shards import SCHEMA

PAGE = ("id", "source", "text", "url", "timestamp", "language", "language_score", "metadata")
"""Fields that a step sees and may change; the text only with an edit map."""


def pages_of(table: pa.Table) -> list[Document]:
    """Return the pages of a table of ``SCHEMA``; the other fields of a document are left out."""
    columns = {name: table.column(name).to_pylist() for name in PAGE}
    columns["metadata"] = [dict(entries) for entries in columns["metadata"]]
    columns["edits"] = [identity(text) for text in columns["text"]]
    return [
        Document(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]


def with_pages(
    table: pa.Table, rows: Sequence[int], before: Sequence[Document], after: Sequence[Document],
    edits: Mapping[int, EditMap],
) -> pa.Table:  # fmt: skip
    """Return some rows of a table, with what steps have made of their pages.

    Args:
        table: Documents, of ``SCHEMA``.
        rows: Rows to return, in increasing order.
        before: Their pages as ``pages_of`` gave them.
        after: Their pages as the last step left them.
        edits: Position in ``rows`` -> map from the text after to the text before, where they
            differ.
    """
    made: dict[str, pa.Array] = {}
    for name in PAGE:
        field = operator.attrgetter(name)
        if any(map(operator.is_not, map(field, before), map(field, after))):
            made[name] = _column(name, list(map(field, after)))
    if edits:
        made["edits"] = _edit_column(table, rows, before, edits)
    if len(rows) < table.num_rows:
        left = [name for name in SCHEMA.names if name not in made]
        table = table.select(left).take(pa.array(rows, pa.int64()))
    arrays = [made[name] if name in made else table.column(name) for name in SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _column(name: str, values: list[Any]) -> pa.Array:
    if name == "metadata":
        values = [sorted(entries.items()) for entries in values]
    return pa.array(values, SCHEMA.field(name).type)


def _edit_column(
    table: pa.Table, rows: Sequence[int], before: Sequence[Document], edits: Mapping[int, EditMap]
) -> pa.Array:
    """Return the edit maps of some rows, chained to those that the rows had."""
    column = table.column("edits").combine_chunks()
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    parts = [values[offsets[row] : offsets[row + 1]] for row in rows]
    for i, later in edits.items():
        parts[i] = _chained(later, parts[i], before[i].text)
    sizes = np.fromiter(map(len, parts), np.int32, len(parts))
    ends = np.concatenate([np.zeros(1, np.int32), np.cumsum(sizes, dtype=np.int32)])
    return pa.ListArray.from_arrays(ends, np.concatenate(parts), type=SCHEMA.field("edits").type)


def _chained(later: EditMap, earlier: npt.NDArray[Any], text: str) -> npt.NDArray[Any]:
    """Chain the edits of a pass to those before it, as flat numbers; int32 [3 x runs]."""
    if earlier.tolist() != [0, 0, len(text)]:
        flat = earlier.tolist()
        later = compose(later, tuple(map(Run, flat[::3], flat[1::3], flat[2::3])))
    return np.fromiter(chain.from_iterable(later), np.int32, 3 * len(later))
