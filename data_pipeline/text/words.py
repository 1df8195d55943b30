"""One splitter of text into words, shared by every rule that counts or compares words.

Definition. Every code point has a class: SPACE (``str.isspace``, separators, U+200B, U+FEFF), MARK
(combining marks and format characters), LETTER (letters, numbers and connector punctuation such as
the underscore, in scripts that set spaces), LONE (the same in scripts that do not: Han, kana, Thai,
Lao, Khmer, Myanmar), JOINER (' U+2019 . U+00B7), COMMA, OTHER (the rest). From left to right:

- a LETTER or MARK begins a word that runs on over LETTERs and MARKs, over a JOINER before a LETTER,
  and over a COMMA between two decimal digits;
- a LONE is a word with the MARKs after it;
- any other character but SPACE is a word with its repetitions and the MARKs after them.

So "Don't panic -- it's 3,000.5%..." is Don't|panic|--|it's|3,000.5|%|... in words.

    words("Two words.").texts()  # ['Two', 'words', '.']
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.text.code_points import (
    ALPHABETIC,
    COMMA,
    DIGIT,
    JOINER,
    LETTER,
    LONE,
    MARK,
    SPACE,
    SYMBOL,
    WORD_CLASS,
    Points,
    code_points,
    properties,
)
from data_pipeline.text.hashing import mix

HAS_LETTER, HAS_CONTENT = 1, 2
"""Flags of a word: it has an alphabetic character; it has one that is no punctuation."""
BASE = np.uint64(0x9FB21C651E98DF25)
"""Odd base of the hash of words: sum of (code point + 1) x base^(characters that follow)."""
_BASE4 = np.uint64(pow(int(BASE), 4, 1 << 64))
_ONE = np.uint64(1)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of a text, as stretches of its code points."""

    text: str = field(repr=False)
    """The text."""
    points: Points = field(repr=False)
    """Its code points, uint32 [characters]."""
    starts: npt.NDArray[np.int32]
    """First character of every word, [words]."""
    ends: npt.NDArray[np.int32]
    """Character after every word, [words]."""
    sums: npt.NDArray[np.uint64]
    """Polynomial of every word in ``BASE``, [words]."""
    flags: npt.NDArray[np.uint8]
    """``HAS_LETTER`` and ``HAS_CONTENT`` of every word, [words]."""

    def __len__(self) -> int:
        return int(self.starts.shape[0])

    def texts(self) -> list[str]:
        """Return the words as strings."""
        text = self.text
        spans = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [text[start:end] for start, end in spans]


@compiled
def _joins(points: Any, table: Any, j: int, kind: int) -> Any:
    """Whether the JOINER or COMMA at j, between two characters, stands inside a word."""
    after = table[points[j + 1]]
    if kind == JOINER:
        return (after & WORD_CLASS) == LETTER
    return kind == COMMA and (table[points[j - 1]] & after & DIGIT) != 0


@compiled
def _split(points: Any, table: Any, starts: Any, ends: Any, sums: Any, flags: Any) -> int:
    """Write bounds, polynomial and flags of every word; return their number."""
    count = 0
    length = points.shape[0]
    i = 0
    while i < length:
        bits = table[points[i]]
        kind = bits & WORD_CLASS
        if kind == SPACE:
            i += 1
            continue
        some, every = bits, bits
        total = np.uint64(points[i]) + _ONE
        j = i + 1
        if kind <= MARK:
            while j < length:
                bits = table[points[j]]
                each = bits & WORD_CLASS
                if each > MARK and not (j + 1 < length and _joins(points, table, j, each)):
                    break
                some |= bits
                every &= bits
                total = total * BASE + np.uint64(points[j]) + _ONE
                j += 1
        else:
            while kind != LONE and j < length and points[j] == points[i]:
                total = total * BASE + np.uint64(points[j]) + _ONE
                j += 1
            while j < length and (table[points[j]] & WORD_CLASS) == MARK:
                some |= table[points[j]]
                every &= table[points[j]]
                total = total * BASE + np.uint64(points[j]) + _ONE
                j += 1
        starts[count] = i
        ends[count] = j
        sums[count] = total
        flags[count] = ((some & ALPHABETIC) != 0) | (((every & SYMBOL) == 0) << 1)
        count += 1
        i = j
    return count


@compiled
def polynomial(points: Any, start: int, end: int) -> Any:
    """Return the polynomial of points[start:end], as ``Words.sums`` has it for words."""
    total = np.uint64(0)
    for k in range(start, end):
        total = total * BASE + np.uint64(points[k]) + _ONE
    return total


@compiled
def hash_points(points: Any, start: int, end: int) -> Any:
    """Return a 64-bit hash of points[start:end]; four sums side by side keep the processor busy."""
    a = b = c = d = np.uint64(end - start)
    k = start
    while k + 4 <= end:
        a = a * _BASE4 + np.uint64(points[k])
        b = b * _BASE4 + np.uint64(points[k + 1])
        c = c * _BASE4 + np.uint64(points[k + 2])
        d = d * _BASE4 + np.uint64(points[k + 3])
        k += 4
    total = ((a * BASE + b) * BASE + c) * BASE + d
    while k < end:
        total = total * BASE + np.uint64(points[k]) + _ONE
        k += 1
    return mix(total)


def _words(text: str) -> Words:
    """Split a text into words."""
    points = code_points(text)
    size = points.shape[0]
    starts, ends = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
    sums, flags = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.uint8)
    n = _split(points, properties(), starts, ends, sums, flags)
    return Words(
        text, points, starts[:n].copy(), ends[:n].copy(), sums[:n].copy(), flags[:n].copy()
    )


class Splitter:
    """Splits texts into words, and keeps those of the last texts: several rules ask in turn."""

    def __init__(self, characters: int) -> None:
        """Keep texts of at most so many characters together."""
        self._left = characters
        self._kept: dict[str, Words] = {}

    def __call__(self, text: str) -> Words:
        """Split a text into words."""
        known = self._kept.get(text)
        if known is not None:
            return known
        split = _words(text)
        self._kept[text] = split
        self._left -= len(text)
        while self._left < 0:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._left += len(oldest)
        return split


words = Splitter(characters=2_000_000)
"""Split a text into words. A batch of documents is judged rule by rule, so what a batch holds stays
at hand: about 8 bytes per character, 21 where every character is a word."""
