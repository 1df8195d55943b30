"""Gopher's rules for the quality of a page (arXiv:2112.11446, appendix A1.1), as datatrove counts.

Words are those of ``words.py``. Only words with a character that is no punctuation are counted and
measured; the ratios and the share of words with a letter are over all, punctuation included. Stop
words count once each, upper case is another word.

    GopherQuality(GopherQualityConfig())(document)  # Kept, or Dropped("gopher_quality.few_words")
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.config.rules import GopherQualityConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.language_limits import limits_by_language, thresholds_version
from data_pipeline.filters.measures import Measure, findings, ratio, verdict
from data_pipeline.step import Finding, StepKind, Verdict
from data_pipeline.text.code_points import (
    BLANK,
    COUNTED,
    LINE_BREAK,
    Points,
    code_points,
    properties,
)
from data_pipeline.text.words import HAS_CONTENT, HAS_LETTER, Words, polynomial, words

STAGE = "gopher_quality"
_ZERO, _ONE, _U32 = np.uint64(0), np.uint64(1), np.uint64(32)
_HASH_SIGN, _FULL_STOP, _ELLIPSIS, _NEWLINE, _RETURN = map(ord, "#.…\n\r")


@compiled
def _word_counts(starts: Any, ends: Any, sums: Any, flags: Any, stop: Any) -> Any:
    """Count words that are no punctuation, their characters, words with a letter, stop words."""
    counts = np.zeros(4, dtype=np.int64)
    seen = np.zeros(stop.shape[0], dtype=np.bool_)
    last = np.uint64(stop.shape[0] - 1)
    for k in range(starts.shape[0]):
        content = (flags[k] & HAS_CONTENT) != 0
        counts[0] += content
        counts[1] += content * (ends[k] - starts[k])
        counts[2] += flags[k] & HAS_LETTER
        slot = _slot(sums[k], last)
        while stop[slot] != _ZERO:
            if stop[slot] == sums[k]:
                counts[3] += not seen[slot]
                seen[slot] = True
                break
            slot = (slot + _ONE) & last
    return counts


@compiled
def _slot(key: Any, last: Any) -> Any:
    """Return where the search for a stop word begins."""
    return (key ^ (key >> _U32)) & last


@compiled
def _line_counts(points: Any, table: Any, bullets: Any) -> Any:
    """Count # signs, ellipses, lines, lines that begin with a bullet or end with an ellipsis."""
    counts = np.zeros(5, dtype=np.int64)
    length = points.shape[0]
    begin = dots = dots_end = 0  # full stops in a row, and where they end
    for i in range(length + 1):
        if i < length:
            bits = table[points[i]]
            if not bits & (LINE_BREAK | COUNTED):
                continue
            if bits & COUNTED:
                counts[0] += points[i] == _HASH_SIGN
                counts[1] += points[i] == _ELLIPSIS
                if points[i] == _FULL_STOP:
                    dots = dots + 1 if dots_end == i else 1
                    dots_end = i + 1
                    if dots == 3:
                        counts[1] += 1
                        dots = 0
                continue
        if i == begin and (i == length or _ends_return(points, i)):
            begin = i + 1
            continue
        start, end = begin, i
        while start < end and table[points[start]] & BLANK:
            start += 1
        while end > start and table[points[end - 1]] & BLANK:
            end -= 1
        counts[2] += 1
        if end > start:
            for each in bullets:
                counts[3] += points[start] == each
            counts[4] += points[end - 1] == _ELLIPSIS or _ends_in_dots(points, start, end)
        begin = i + 1
    return counts


@compiled
def _ends_return(points: Any, i: int) -> Any:
    """Whether the newline at i belongs to the carriage return before it."""
    return i > 0 and points[i] == _NEWLINE and points[i - 1] == _RETURN


@compiled
def _ends_in_dots(points: Any, start: int, end: int) -> Any:
    """Whether three full stops stand at the end."""
    if end - start < 3 or points[end - 1] != _FULL_STOP:
        return False
    return points[end - 2] == _FULL_STOP and points[end - 3] == _FULL_STOP


@functools.lru_cache(maxsize=256)
def _stop_table(stop_words: tuple[str, ...]) -> npt.NDArray[np.uint64]:
    """Return an open-addressing table of the hashes of words, 0 where it is free."""
    size = 16
    while size < 4 * len(stop_words):
        size *= 2
    table = np.zeros(size, dtype=np.uint64)
    for word in dict.fromkeys(stop_words):
        points = code_points(word)
        key = np.uint64(polynomial(points, 0, points.shape[0]))
        slot = int(_slot(key, np.uint64(size - 1)))
        while table[slot]:
            slot = (slot + 1) & (size - 1)
        table[slot] = key
    return table


@functools.lru_cache(maxsize=64)
def _characters(characters: tuple[str, ...]) -> Points:
    return np.array([ord(each) for each in dict.fromkeys(characters)], dtype=np.uint32)


def measures(split: Words, limits: GopherQualityConfig) -> Iterator[Measure]:
    """Yield what the rules measure in a text, in their order."""
    stop = _stop_table(limits.stop_words)
    counts = _word_counts(split.starts, split.ends, split.sums, split.flags, stop).tolist()
    num_words, characters, alphabetic, stop_words = counts
    yield Measure("few_words", num_words, limits.min_words)
    yield Measure("many_words", num_words, None, limits.max_words)
    mean = ratio(characters, num_words)
    yield Measure("short_words", mean, limits.min_mean_word_length)
    yield Measure("long_words", mean, None, limits.max_mean_word_length)
    lines = _line_counts(split.points, properties(), _characters(limits.bullets)).tolist()
    hashes, ellipses, num_lines, bullet_lines, ellipsis_lines = lines
    total = len(split)
    yield Measure("hashes", ratio(hashes, total), None, limits.max_hash_ratio)
    yield Measure("ellipses", ratio(ellipses, total), None, limits.max_ellipsis_ratio)
    share = ratio(bullet_lines, num_lines)
    yield Measure("bullet_lines", share, None, limits.max_bullet_lines)
    share = ratio(ellipsis_lines, num_lines)
    yield Measure("ellipsis_lines", share, None, limits.max_ellipsis_lines)
    yield Measure("few_letters", ratio(alphabetic, total), limits.min_alphabetic_words)
    yield Measure("few_stop_words", stop_words, limits.min_stop_words)


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Drops pages that do not look like prose; texts stay as they are.

    Reasons: few_words, many_words, short_words, long_words, hashes, ellipses, bullet_lines,
    ellipsis_lines, few_letters, few_stop_words.
    """

    limits: GopherQualityConfig = field(default_factory=GopherQualityConfig)
    """Limits of documents whose language has none of its own."""
    by_language: tuple[tuple[str, GopherQualityConfig], ...] = ()
    """Limits by ISO-639-1 code."""
    name: str = STAGE
    """Name in manifests and in the funnel."""
    _languages: dict[str, GopherQualityConfig] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look languages up by code."""
        object.__setattr__(self, "_languages", dict(self.by_language))

    def _measures(self, document: Document) -> Iterator[Measure]:
        limits = self._languages.get(document.language, self.limits)
        return measures(words(document.text), limits)

    def __call__(self, document: Document) -> Verdict:
        """Keep the document or drop it."""
        return verdict(document, STAGE, self._measures(document))

    def findings(self, document: Document) -> list[Finding]:
        """Return what every rule measures."""
        return findings(STAGE, self._measures(document))


def _options(config: PipelineConfig) -> dict[str, Any]:
    section = config.gopher_quality
    return {
        "limits": section,
        "by_language": limits_by_language(section, STAGE, section.per_language),
    }


def _settings(config: PipelineConfig) -> dict[str, Any]:
    section = config.gopher_quality
    return {**asdict(section), "per_language": thresholds_version(section.per_language)}


GOPHER_QUALITY = StepKind(build=GopherQuality, options=_options, settings=_settings)
"""How the stage comes out of the configuration."""
