"""A document on its way to tokens, and the edit map that leads back to the extracted text.

Cleaning only deletes or substitutes. Every rule that changes text returns runs
(final_start, extracted_start, length), in characters: text[final_start:final_start+length] equals
the rule's input at [extracted_start:extracted_start+length]. ``compose`` chains two such maps, so
the map of a document always leads from its present text to the text the extractor produced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Run(NamedTuple):
    """A stretch of characters that stands unchanged in both texts."""

    final_start: int
    """Offset in the text after the edit, in characters."""
    extracted_start: int
    """Offset in the text before the edit, in characters."""
    length: int
    """Characters in the stretch."""


EditMap = tuple[Run, ...]
"""Runs in increasing order of both offsets; what lies between them was inserted or deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extractor:
    """What turned the record's payload into text; enough to do it again."""

    name: str
    """``resiliparse``, or ``none`` for sources that hold text already."""
    version: str
    """Package version that was used."""
    options: str = ""
    """Options as canonical JSON."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One page with its text, its origin and what has been done to it.

    It has a ``__dict__``, so that a copy with other values takes one update and no constructor.
    """

    id: str
    """blake3-128 hex of (source, record id or id field or (file sha256, ordinal))."""
    source: str
    """Name of the source it belongs to."""
    text: str
    """The text as it stands now."""
    url: str = ""
    """Address, or an empty string."""
    timestamp: str = ""
    """ISO-8601 time of the crawl, or an empty string."""
    source_file_id: str = ""
    """sha256 hex of the raw file it was read from."""
    member_offset: int = 0
    """Byte offset of its record (gzip member) in the raw file, or line/row ordinal."""
    member_length: int = 0
    """Bytes of its record in the raw file (compressed member)."""
    payload_sha256: str = ""
    """sha256 hex of the payload that was extracted."""
    extractor: Extractor = Extractor(name="none", version="")
    """What made the text."""
    extracted_sha256: str = ""
    """sha256 hex of the extracted text as UTF-8."""
    edits: EditMap = ()
    """Map from ``text`` to the extracted text."""
    language: str = ""
    """ISO-639-1 code, once identified."""
    language_score: float = 0.0
    """Confidence of the language in [0, 1]."""
    cluster: str = ""
    """Id of its near-duplicate cluster (smallest member id), once clustered."""
    cluster_size: int = 1
    """Members of the cluster before deduplication."""
    metadata: dict[str, str] = field(default_factory=dict)
    """Further fields of the source, as strings."""

    def changed(self, **values: Any) -> "Document":
        """Return the document with some fields changed, as ``dataclasses.replace`` would.

        A pass over a shard changes most documents; this takes a tenth of the time.
        """
        copy = object.__new__(Document)
        copy.__dict__.update(self.__dict__)
        copy.__dict__.update(values)
        return copy

    def edited(self, text: str, runs: Sequence[Run]) -> "Document":
        """Return the document with another text; ``runs`` lead from it to the present one."""
        return self.changed(text=text, edits=compose(runs, self.edits))


def compose(later: Sequence[Run], earlier: Sequence[Run]) -> EditMap:
    """Chain two edit maps: C to B (``later``) and B to A (``earlier``) become C to A."""
    end = later[-1].extracted_start + later[-1].length if later else 0
    if len(earlier) == 1 and earlier[0][:2] == (0, 0) and end <= earlier[0].length:
        return tuple(_merged(later))  # B is A, or its beginning
    result: list[Run] = []
    start = 0
    for run in later:
        run_end = run.extracted_start + run.length
        while start < len(earlier) and (
            earlier[start].final_start + earlier[start].length <= run.extracted_start
        ):
            start += 1
        i = start
        while i < len(earlier) and earlier[i].final_start < run_end:
            low = max(run.extracted_start, earlier[i].final_start)
            high = min(run_end, earlier[i].final_start + earlier[i].length)
            final = run.final_start + low - run.extracted_start
            origin = earlier[i].extracted_start + low - earlier[i].final_start
            last = result[-1] if result else None
            if (
                last is not None
                and last.final_start + last.length == final
                and last.extracted_start + last.length == origin
            ):
                result[-1] = last._replace(length=last.length + high - low)
            else:
                result.append(Run(final, origin, high - low))
            i += 1
    return tuple(result)


def _merged(runs: Sequence[Run]) -> list[Run]:
    """Join runs that touch in both texts."""
    result: list[Run] = []
    for run in runs:
        if result:
            final, extracted, length = result[-1]
            if run.final_start == final + length and run.extracted_start == extracted + length:
                result[-1] = Run(final, extracted, length + run.length)
                continue
        result.append(run)
    return result


def identity(text: str) -> EditMap:
    """Return the edit map of a text nobody has edited yet."""
    return (Run(0, 0, len(text)),) if text else ()


def spliced(text: str, replacements: Sequence[tuple[int, int, str]]) -> tuple[str, list[Run]]:
    """Replace stretches of a text; return the new text and the runs that lead back.

    ``replacements`` are (start, end, what stands there instead), in order and apart.
    """
    parts: list[str] = []
    runs: list[Run] = []
    position = done = 0
    for start, end, instead in (*replacements, (len(text), len(text), "")):
        if start > done:
            parts.append(text[done:start])
            runs.append(Run(position, done, start - done))
            position += start - done
        parts.append(instead)
        position += len(instead)
        done = end
    return "".join(parts), runs
