"""Rows of metrics by field, as arrays: what a page of 100,000 rows is drawn from in a few seconds.

A number that a row does not have is NaN: rows hold none themselves. Rows are taken a block at a
time and let go, so a long run needs the memory of its numbers and not of its rows.

    rows = read_columns(run / "metrics.jsonl")
    rows.column("loss")                  # float64 [num_rows]
    rows.inside("source_loss", "web")    # of the object "source_loss"
    rows.last["step"]                    # the last row as it was written
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain import json_lines
from llmtrain.errors import ConfigError

Row = dict[str, Any]
Values = NDArray[np.float64]
Places = NDArray[np.intp]


class Columns:
    """The numbers of rows by field."""

    def __init__(self, blocks: Iterable[Sequence[Row]], only: Collection[str] = ()) -> None:
        """Take rows in order, of their fields ``only`` these; all of them if empty."""
        self.last: Row = {}
        self.num_rows = 0
        self._only = only
        self._parts: dict[tuple[str, ...], list[tuple[Places, Values]]] = {}
        for block in blocks:
            self._take((), list(range(self.num_rows, self.num_rows + len(block))), block)
            self.num_rows += len(block)
            self.last = block[-1] if block else self.last

    def _take(self, at: tuple[str, ...], places: Sequence[int], objects: Sequence[Row]) -> None:
        """Keep the numbers in objects that stand at ``at`` of these rows."""
        for keys, found, alike in _shapes(places, objects):
            where = np.array(found)
            for key, values in zip(keys, _turned(alike), strict=True):
                if at or not self._only or key in self._only:
                    self._keep((*at, key), where, values)

    def _keep(self, key: tuple[str, ...], where: Places, values: Sequence[Any] | Values) -> None:
        """Keep values where they are numbers, or objects of numbers."""
        parts = self._parts.setdefault(key, [])
        first = next((value for value in values if value is not None), None)
        if isinstance(first, int | float):
            parts.append((where, np.asarray(values, dtype=np.float64)))  # None becomes NaN
        elif isinstance(first, dict):
            known = [(i, one) for i, one in zip(where.tolist(), values, strict=True) if one]
            if known:
                places, objects = zip(*known, strict=True)
                parts.append((np.array(places), np.ones(len(places))))
                self._take(key, places, objects)

    def _whole(self, *key: str) -> Values:
        found = np.full(self.num_rows, np.nan)
        for where, part in self._parts.get(key, ()):
            found[where] = part
        return found

    def column(self, key: str) -> Values:
        """``row[key]`` of every row; of an object, 1 where it has any field."""
        return self._whole(key)

    def inside(self, key: str, name: str) -> Values:
        """``row[key][name]`` of every row."""
        return self._whole(key, name)

    def names(self, key: str) -> list[str]:
        """Names that appear under ``key`` in any row, in order of appearance."""
        return [found[1] for found in self._parts if len(found) == 2 and found[0] == key]


def _shapes(
    places: Sequence[int], objects: Sequence[Row]
) -> Iterable[tuple[tuple[str, ...], Sequence[int], Sequence[Row]]]:
    """Objects with the same keys together, and where they stand."""
    keys = tuple(objects[0]) if objects else ()
    if all(map(keys.__eq__, map(tuple, objects))):  # nearly always, and much quicker
        return [(keys, places, objects)]
    shapes: dict[tuple[str, ...], tuple[list[int], list[Row]]] = {}
    for place, one in zip(places, objects, strict=True):
        found, alike = shapes.setdefault(tuple(one), ([], []))
        found.append(place)
        alike.append(one)
    return [(keys, *shape) for keys, shape in shapes.items()]


def _turned(alike: Sequence[Row]) -> Iterable[Sequence[Any] | Values]:
    """The values of each key of objects that have the same keys."""
    values = map(dict.values, alike)
    try:
        numbers = np.fromiter(chain.from_iterable(values), np.float64)
        return numbers.reshape(len(alike), -1).T
    except (TypeError, ValueError):  # None, text or an object among them
        return zip(*map(dict.values, alike), strict=True)


def read_columns(path: Path, only: Collection[str] = ()) -> Columns:
    """Rows of a file of metrics; none where there is no file.

    Raises:
        ConfigError: a row does not say which step it is of, or after how many tokens.
    """
    rows = Columns(json_lines.blocks(path), only)
    for key in ("step", "tokens"):
        missing = np.flatnonzero(np.isnan(rows.column(key)))
        if len(missing):
            raise ConfigError(
                f"row {missing[0] + 1} of {path} has no {key}; expected what llmtrain train writes"
            )
    return rows
