"""Settings of the published rules for single documents: C4, Gopher, FineWeb, languages.

Limits are named like what they limit; a share is a number in [0, 1]. Null leaves a rule out where
the field allows it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.errors import ConfigError

_CODE = re.compile("[a-z]{2,3}")


def _check_scores(**scores: float) -> None:
    """Raise ConfigError naming every number outside [0, 1]."""
    problems = [
        f"{name}={value} is no score; use a number in [0, 1]"
        for name, value in scores.items()
        if not 0.0 <= value <= 1.0
    ]
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class C4Config:
    """C4's rules for lines and pages."""

    variant: Literal["c4", "c4_fast", "mc4", "datatrove", "dolma", "fineweb"] = "c4"
    """Thresholds and sentence splitter: c4 as published with punkt, c4_fast with a splitter by
    rules, mc4 with a rule for long lines alone, the others with the defaults of the tool they are
    named for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """Which languages stay."""

    method: Literal["langdetect", "fasttext"] = "langdetect"
    """Identifier: langdetect as in C4, or fastText, which is much faster."""
    languages: tuple[str, ...] = ("en",)
    """ISO-639-1 codes that stay; an empty list keeps and labels all, whatever their score."""
    threshold: float = 0.99
    """Smallest score in [0, 1] that counts."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Smallest score of single languages, by ISO-639-1 code; the others have ``threshold``."""

    def __post_init__(self) -> None:
        """Refuse scores that are none, and thresholds of languages that go anyway."""
        _check_scores(threshold=self.threshold)
        _check_scores(**{f"thresholds.{code}": score for code, score in self.thresholds.items()})
        unknown = [code for code in self.languages if not _CODE.fullmatch(code)]
        if unknown:
            raise ConfigError(
                f"languages names {unknown[0]!r}, which no identifier writes; use codes of "
                "ISO-639-1 in lower case without region: en, de, zh"
            )
        if self.thresholds and not self.languages:
            raise ConfigError(
                "thresholds are set, but languages=[] keeps every document whatever its score; "
                "name the languages, or leave the thresholds out"
            )
        unused = sorted(set(self.thresholds) - set(self.languages))
        if unused:
            raise ConfigError(
                f"thresholds.{unused[0]} is set, but {unused[0]} is not in "
                f"languages={list(self.languages)}; add it there, or leave its threshold out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherQualityConfig:
    """Gopher's rules for the quality of a page (arXiv:2112.11446, appendix A1.1)."""

    min_words: int = 50
    """Fewest words; punctuation is none."""
    max_words: int = 100_000
    """Most words."""
    min_mean_word_length: float = 3.0
    """Smallest mean length of the words, in characters."""
    max_mean_word_length: float = 10.0
    """Largest mean length of the words, in characters."""
    max_hash_ratio: float = 0.1
    """Most # signs per word, punctuation counted as words."""
    max_ellipsis_ratio: float = 0.1
    """Most ellipses per word, punctuation counted as words."""
    max_bullet_lines: float = 0.9
    """Largest share of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Largest share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Smallest share of words with a letter, punctuation counted as words."""
    min_stop_words: int = 2
    """Fewest different stop words."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")
    """Words of which every text has some."""
    bullets: tuple[str, ...] = ("\N{BULLET}", "-")
    """Characters that make a line a list item; the hyphen is datatrove's addition."""
    per_language: str | None = None
    """Limits by language of the document: ``fineweb2``, or a JSON file of the same form; null
    judges all alike."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if any(len(bullet) != 1 for bullet in self.bullets):
            raise ConfigError(f"bullets={list(self.bullets)}; use single characters")
        if any(len(word.split()) != 1 for word in self.stop_words):
            raise ConfigError(f"stop_words={list(self.stop_words)}; use words without spaces")


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherRepetitionConfig:
    """Gopher's rules against repetition (arXiv:2112.11446, table A1)."""

    reading: Literal["fineweb", "massiveweb"] = "fineweb"
    """What counts as repeated: fineweb, occurrences after the first, in shares of the text, as
    datatrove does; massiveweb, every occurrence of what stands twice, in shares of the lines,
    paragraphs and words alone, as DCLM and OLMo do."""
    max_duplicate_lines: float | None = 0.3
    """Largest share of lines that are duplicates."""
    max_duplicate_paragraphs: float | None = 0.3
    """Largest share of paragraphs that are duplicates."""
    max_duplicate_line_characters: float | None = 0.2
    """Largest share of characters in duplicate lines."""
    max_duplicate_paragraph_characters: float | None = 0.2
    """Largest share of characters in duplicate paragraphs."""
    max_top_ngram_characters: tuple[float, ...] = (0.2, 0.18, 0.16)
    """Largest share of characters in the most frequent n-gram of words, for n = 2, 3, 4; a shorter
    list leaves the longer n-grams out."""
    max_duplicate_ngram_characters: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """Largest share of characters in repeated n-grams of words, for n = 5 to 10; a shorter list
    leaves the longer n-grams out."""
    per_language: str | None = None
    """Limits by language of the document: ``fineweb2``, or a JSON file of the same form; null
    judges all alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FineWebConfig:
    """FineWeb's own rules (arXiv:2406.17557, section 3.6), on lines that are not blank."""

    min_end_mark_lines: float = 0.12
    """Smallest share of lines that end with a sentence mark of any script."""
    max_short_lines: float = 0.67
    """Largest share of short lines."""
    short_line_characters: int = 30
    """A line of at most as many characters is short."""
    max_duplicate_line_characters: float = 0.01
    """Largest share of the characters, newlines aside, in lines that stood before."""
    max_newlines_per_word: float = 0.3
    """Most newlines per word, punctuation counted as words."""
    per_language: str | None = None
    """Limits by language of the document: ``fineweb2``, or a JSON file of the same form; null
    judges all alike."""
