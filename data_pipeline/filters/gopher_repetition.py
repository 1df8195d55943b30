"""Gopher's rules against repetition (arXiv:2112.11446, table A1), in the two readings in use.

``fineweb``, as datatrove counts: what stood before is a duplicate, its first occurrence is none;
lines and paragraphs are cut at runs of newlines and compared as they stand; characters are taken in
shares of the whole text; the top n-gram counts with single spaces between its words, even where it
stands once; of the longer n-grams those that stood before count, from left to right, each stepped
over as a whole.

``massiveweb``, as DCLM and OLMo count: every occurrence of what stands at least twice is repeated;
lines and paragraphs are stripped and blank ones left out, punctuation is no word; shares are of the
characters in the lines, paragraphs and words themselves; of n-grams from n = 5 the words count that
any repeated one covers.

    GopherRepetition(GopherRepetitionConfig())(document)  # Dropped("gopher_repetition.top_2_gram")
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline.config.rules import GopherRepetitionConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.language_limits import limits_by_language, thresholds_version
from data_pipeline.filters.measures import Measure, findings, ratio, verdict
from data_pipeline.step import Finding, StepKind, Verdict
from data_pipeline.text.code_points import ALPHANUMERIC, properties
from data_pipeline.text.repetition import (
    covered_characters,
    duplicate_ngrams,
    duplicates,
    prefixes,
    segments,
    top_ngrams,
)
from data_pipeline.text.words import words

STAGE = "gopher_repetition"
_BLANK_LINE = re.compile(r"\n\n")
_TOP_N, _DUPLICATE_N = 2, 5
"""The n-grams that the first limits of the two lists are for."""


def fineweb_measures(text: str, limits: GopherRepetitionConfig) -> Iterator[Measure]:
    """Yield what the rules measure in a text, as datatrove reads them."""
    yield Measure("empty", len(text), 1)
    split = words(text)
    points, length = split.points, len(text)
    lead = length - len(text.lstrip())
    pieces = segments(points, lead, max(lead, len(text.rstrip())), 2)
    count, characters = duplicates(*pieces)
    yield Measure(
        "duplicate_paragraphs", ratio(count, len(pieces[0])), None, limits.max_duplicate_paragraphs
    )
    yield Measure(
        "duplicate_paragraph_characters", ratio(characters, length), None,
        limits.max_duplicate_paragraph_characters,
    )  # fmt: skip
    pieces = segments(points, 0, length, 1)
    count, characters = duplicates(*pieces)
    yield Measure("duplicate_lines", ratio(count, len(pieces[0])), None, limits.max_duplicate_lines)
    yield Measure(
        "duplicate_line_characters", ratio(characters, length), None,
        limits.max_duplicate_line_characters,
    )  # fmt: skip
    sizes, joined, sequence = prefixes(split.starts, split.ends, split.sums)
    last = _TOP_N + len(limits.max_top_ngram_characters) - 1
    tops = top_ngrams(sizes, sequence, _TOP_N, last, False).tolist()
    for n, most in enumerate(limits.max_top_ngram_characters, _TOP_N):
        occurrences, size = tops[n - _TOP_N]
        share = ratio(occurrences * (size + n - 1), length)
        yield Measure(f"top_{n}_gram", share, None, most)
    last = _DUPLICATE_N + len(limits.max_duplicate_ngram_characters) - 1
    counts = duplicate_ngrams(sizes, joined, _DUPLICATE_N, last).tolist()
    for n, most in enumerate(limits.max_duplicate_ngram_characters, _DUPLICATE_N):
        share = ratio(counts[n - _DUPLICATE_N], length)
        yield Measure(f"duplicate_{n}_grams", share, None, most)


def massiveweb_measures(text: str, limits: GopherRepetitionConfig) -> Iterator[Measure]:
    """Yield what the rules measure in a text, as DCLM and OLMo read them."""
    lines = _stripped(text.split("\n"))
    yield Measure("empty", len(lines), 1)
    paragraphs = _stripped(_BLANK_LINE.split(text))
    line_shares, paragraph_shares = _repeated_shares(lines), _repeated_shares(paragraphs)
    yield Measure("duplicate_lines", line_shares[0], None, limits.max_duplicate_lines)
    yield Measure(
        "duplicate_paragraphs", paragraph_shares[0], None, limits.max_duplicate_paragraphs
    )
    yield Measure(
        "duplicate_line_characters", line_shares[1], None, limits.max_duplicate_line_characters
    )
    yield Measure(
        "duplicate_paragraph_characters", paragraph_shares[1], None,
        limits.max_duplicate_paragraph_characters,
    )  # fmt: skip
    split = words(text)
    real = (properties()[split.points[split.starts]] & ALPHANUMERIC) != 0
    sizes, _, sequence = prefixes(split.starts[real], split.ends[real], split.sums[real])
    total = int(sizes[-1])
    last = _TOP_N + len(limits.max_top_ngram_characters) - 1
    tops = top_ngrams(sizes, sequence, _TOP_N, last, True).tolist()
    for n, most in enumerate(limits.max_top_ngram_characters, _TOP_N):
        occurrences, size = tops[n - _TOP_N]
        share = ratio(occurrences * size, total) if occurrences > 1 else 0.0
        yield Measure(f"top_{n}_gram", share, None, most)
    last = _DUPLICATE_N + len(limits.max_duplicate_ngram_characters) - 1
    counts = covered_characters(sizes, sequence, _DUPLICATE_N, last).tolist()
    for n, most in enumerate(limits.max_duplicate_ngram_characters, _DUPLICATE_N):
        share = ratio(counts[n - _DUPLICATE_N], total)
        yield Measure(f"duplicate_{n}_grams", share, None, most)


def _stripped(pieces: list[str]) -> list[str]:
    return [stripped for piece in pieces if (stripped := piece.strip())]


def _repeated_shares(pieces: list[str]) -> tuple[float, float]:
    """Return the shares of pieces and of their characters that stand at least twice."""
    counts = [(piece, count) for piece, count in Counter(pieces).items() if count > 1]
    characters = sum(len(piece) * count for piece, count in counts)
    total = sum(map(len, pieces))
    return ratio(sum(count for _, count in counts), len(pieces)), ratio(characters, total)


READINGS = {"fineweb": fineweb_measures, "massiveweb": massiveweb_measures}
"""By the name used in configurations."""


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Drops pages that repeat themselves; texts stay as they are.

    Reasons: empty, duplicate_paragraphs, duplicate_paragraph_characters, duplicate_lines,
    duplicate_line_characters, top_2_gram to top_4_gram, duplicate_5_grams to duplicate_10_grams.
    """

    limits: GopherRepetitionConfig = field(default_factory=GopherRepetitionConfig)
    """Limits of documents whose language has none of its own."""
    by_language: tuple[tuple[str, GopherRepetitionConfig], ...] = ()
    """Limits by ISO-639-1 code."""
    name: str = STAGE
    """Name in manifests and in the funnel."""
    _languages: dict[str, GopherRepetitionConfig] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Look languages up by code."""
        object.__setattr__(self, "_languages", dict(self.by_language))

    def _measures(self, document: Document) -> Iterator[Measure]:
        limits = self._languages.get(document.language, self.limits)
        return READINGS[limits.reading](document.text, limits)

    def __call__(self, document: Document) -> Verdict:
        """Keep the document or drop it."""
        return verdict(document, STAGE, self._measures(document))

    def findings(self, document: Document) -> list[Finding]:
        """Return what every rule measures."""
        return findings(STAGE, self._measures(document))


def _options(config: PipelineConfig) -> dict[str, Any]:
    section = config.gopher_repetition
    return {
        "limits": section,
        "by_language": limits_by_language(section, STAGE, section.per_language),
    }


def _settings(config: PipelineConfig) -> dict[str, Any]:
    section = config.gopher_repetition
    return {**asdict(section), "per_language": thresholds_version(section.per_language)}


GOPHER_REPETITION = StepKind(build=GopherRepetition, options=_options, settings=_settings)
"""How the stage comes out of the configuration."""
