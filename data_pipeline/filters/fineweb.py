"""FineWeb's own rules, found by comparing histograms of good and bad crawls (arXiv:2406.17557).

They look at the lines between newlines that are not blank, as they stand: an end mark of any script
counts only at the very end, and a line is a duplicate if it stood before in the page. Newlines are
counted against the words of ``words.py``.

    FineWeb(FineWebConfig())(document)  # Kept, or Dropped("fineweb.short_lines")
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline.compiled import compiled
from data_pipeline.config.rules import FineWebConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.language_limits import limits_by_language, thresholds_version
from data_pipeline.filters.measures import Measure, findings, ratio, verdict
from data_pipeline.step import Finding, StepKind, Verdict
from data_pipeline.text.code_points import BLANK, END_MARK, properties
from data_pipeline.text.repetition import duplicates
from data_pipeline.text.words import hash_points, words

STAGE = "fineweb"
_NEWLINE = 10


@compiled
def _lines(points: Any, table: Any, short: int) -> Any:
    """Return (hashes, lengths, [with an end mark, short, newlines]) of the lines with content."""
    length = points.shape[0]
    counts = np.zeros(3, dtype=np.int64)
    for i in range(length):
        counts[2] += points[i] == _NEWLINE
    hashes = np.empty(counts[2] + 1, dtype=np.uint64)
    lengths = np.empty(counts[2] + 1, dtype=np.int64)
    number = begin = 0
    blank = True
    for i in range(length + 1):
        if i < length and points[i] != _NEWLINE:
            blank &= (table[points[i]] & BLANK) != 0
            continue
        if not blank:
            hashes[number] = hash_points(points, begin, i)
            lengths[number] = i - begin
            number += 1
            counts[0] += (table[points[i - 1]] & END_MARK) != 0
            counts[1] += i - begin <= short
        begin = i + 1
        blank = True
    return hashes[:number], lengths[:number], counts


def measures(text: str, limits: FineWebConfig) -> Iterator[Measure]:
    """Yield what the rules measure in a text, in their order."""
    split = words(text)
    hashes, lengths, counts = _lines(split.points, properties(), limits.short_line_characters)
    end_marks, short, newlines = counts.tolist()
    lines = len(hashes)
    yield Measure("empty", lines, 1)
    yield Measure("few_end_marks", ratio(end_marks, lines), limits.min_end_mark_lines)
    yield Measure("short_lines", ratio(short, lines), None, limits.max_short_lines)
    _, characters = duplicates(hashes, lengths)
    share = ratio(int(characters), len(text) - newlines)
    yield Measure("duplicate_lines", share, None, limits.max_duplicate_line_characters)
    share = ratio(newlines, len(split))
    yield Measure("newlines", share, None, limits.max_newlines_per_word)


@dataclass(frozen=True, slots=True)
class FineWeb:
    """Drops pages of lists, menus and repeated lines; texts stay as they are.

    Reasons: empty, few_end_marks, short_lines, duplicate_lines, newlines.
    """

    limits: FineWebConfig = field(default_factory=FineWebConfig)
    """Limits of documents whose language has none of its own."""
    by_language: tuple[tuple[str, FineWebConfig], ...] = ()
    """Limits by ISO-639-1 code."""
    name: str = STAGE
    """Name in manifests and in the funnel."""
    _languages: dict[str, FineWebConfig] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look languages up by code."""
        object.__setattr__(self, "_languages", dict(self.by_language))

    def _measures(self, document: Document) -> Iterator[Measure]:
        return measures(document.text, self._languages.get(document.language, self.limits))

    def __call__(self, document: Document) -> Verdict:
        """Keep the document or drop it."""
        return verdict(document, STAGE, self._measures(document))

    def findings(self, document: Document) -> list[Finding]:
        """Return what every rule measures."""
        return findings(STAGE, self._measures(document))


def _options(config: PipelineConfig) -> dict[str, Any]:
    section = config.fineweb
    return {
        "limits": section,
        "by_language": limits_by_language(section, STAGE, section.per_language),
    }


def _settings(config: PipelineConfig) -> dict[str, Any]:
    section = config.fineweb
    return {**asdict(section), "per_language": thresholds_version(section.per_language)}


FINEWEB = StepKind(build=FineWeb, options=_options, settings=_settings)
"""How the stage comes out of the configuration."""
