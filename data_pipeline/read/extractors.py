"""The extractors a run may choose, and the union of both.

``union`` is resiliparse's text with those lines of trafilatura's that it does not have: a line is
the same if its letters and digits stand in the other text in that order, whatever the spacing, the
bullets and the line breaks. A line that is taken in follows the line that its predecessor was found
in, so that the page keeps its order.

    with page_extractor(ExtractConfig(extractor="union")) as extractor:
        payload_text(payload, "text/html", extractor=extractor)
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from data_pipeline.config.extract import ExtractConfig, ExtractorName
from data_pipeline.document import Extractor
from data_pipeline.read.extract import PageExtractor, Resiliparse
from data_pipeline.read.trafilatura_process import TrafilaturaProcess
from data_pipeline.step import Dropped


class Union:
    """The lines of two extractors."""

    def __init__(self, first: PageExtractor, second: PageExtractor) -> None:
        """Take the lines of ``first``, and those of ``second`` that it does not have."""
        self._first, self._second = first, second
        both = (first.extractor, second.extractor)
        self.extractor = Extractor(
            name="union",
            version=", ".join(f"{made.name} {made.version}" for made in both),
            options=json.dumps(
                {made.name: json.loads(made.options) for made in both},
                sort_keys=True, separators=(",", ":"),
            ),
        )  # fmt: skip

    def text_of(self, html: str, tree: Any) -> str | Dropped:
        """Return the lines of both; a page that one of them gives up has none."""
        first = self._first.text_of(html, tree)
        if isinstance(first, Dropped):
            return first
        second = self._second.text_of(html, tree)
        return second if isinstance(second, Dropped) else union_of(first, second)


def union_of(first: str, second: str) -> str:
    """Return ``first`` with the lines of ``second`` that it does not have, in their places."""
    if not first.strip():
        return second
    lines = first.split("\n")
    keys = [_key(line) for line in lines]
    joined, ends = "".join(keys), list(accumulate(map(len, keys)))
    after: dict[int, list[str]] = {}
    cursor, place = 0, -1
    for line in second.split("\n"):
        key = _key(line)
        if not key:
            continue
        at = joined.find(key, cursor)
        if at < 0:
            at = joined.find(key)
        if at >= 0:
            cursor = at + len(key)
            place = bisect_right(ends, cursor - 1)
        else:
            after.setdefault(place, []).append(line)
    merged = list(after.get(-1, []))
    for i, line in enumerate(lines):
        merged.append(line)
        merged += after.get(i, [])
    return "\n".join(merged)


def _key(line: str) -> str:
    """Return the letters and digits of a line."""
    return "".join(filter(str.isalnum, line)).casefold()


_BUILD: dict[ExtractorName, Callable[[TrafilaturaProcess], PageExtractor]] = {
    "trafilatura": lambda trafilatura: trafilatura,
    "union": lambda trafilatura: Union(Resiliparse(), trafilatura),
}


@contextmanager
def page_extractor(config: ExtractConfig) -> Iterator[PageExtractor]:
    """Give the extractor that ``config.extractor`` names, for as long as it is needed."""
    if config.extractor == "resiliparse":
        yield Resiliparse()
        return
    with TrafilaturaProcess(config.trafilatura) as trafilatura:
        yield _BUILD[config.extractor](trafilatura)
