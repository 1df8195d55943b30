"""Words as texts are compared by them: lower case, between white space, without punctuation.

This is how GPT-3's decontamination counts words (arXiv:2005.14165, appendix C): "don't" is one,
"dont". In scripts that set no spaces every character is one. Every word knows where it stands in
the text, and n words in a row have a 64-bit hash that takes the same time for any n.

    words = normal_words("Two words.")
    words.phrase(0, 2)                      # 'two words'
"""

import functools
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.text.code_points import (
    ALPHANUMERIC,
    LONE,
    MARK,
    SPACE,
    WORD_CLASS,
    code_points,
    properties,
)
from data_pipeline.text.hashing import mix
from data_pipeline.text.letter_case import lower_case

_BASE = np.uint64(0x9E3779B97F4A7C15)
_START = np.uint64(0xCBF29CE484222325)
_SOFT_HYPHEN = 0xAD
_NOTHING, _BETWEEN, _IN_WORD, _ALONE = 0, 1, 2, 3
_ROLE_SHIFT = 24
_POINT = 0x1FFFFF


class NormalWords(NamedTuple):
    """The words of a text as they are compared."""

    points: npt.NDArray[np.uint32]
    """Code points of all words, one after the other."""
    bounds: npt.NDArray[np.int32]
    """Where each word begins in ``points``, and the end, [words + 1]."""
    starts: npt.NDArray[np.int32]
    """First character of each word in the text, [words]."""
    ends: npt.NDArray[np.int32]
    """Character after each word in the text, [words]."""
    hashes: npt.NDArray[np.uint64]
    """Hash of each word, [words]."""

    def phrase(self, first: int, number: int) -> str:
        """Return some words with a space between them."""
        bounds = self.bounds[first : first + number + 1].tolist()
        words = (self.points[low:high].tolist() for low, high in pairwise(bounds))
        return " ".join("".join(map(chr, word)) for word in words)

    def utf8(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Return the words as UTF-8, one after the other, and where each begins, and the end."""
        points = self.points
        text = points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        sizes = 1 + (points > 0x7F) + (points > 0x7FF).astype(np.int64) + (points > 0xFFFF)
        ends = np.zeros(len(points) + 1, dtype=np.int64)
        np.cumsum(sizes, out=ends[1:])
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8), ends[self.bounds]


@functools.cache
def _table() -> npt.NDArray[np.uint32]:
    """Return what becomes of every code point: lower case, and above it what it does to words."""
    lower, bits = lower_case(), properties()
    after = bits[lower]
    kind = after & WORD_CLASS
    table = lower.copy()
    in_word = ((after & ALPHANUMERIC) != 0) | (kind == MARK)
    for mask, role in ((in_word, _IN_WORD), (kind == LONE, _ALONE), (kind == SPACE, _BETWEEN)):
        table[mask] = lower[mask] | np.uint32(role << _ROLE_SHIFT)
    table[~(in_word | (kind == LONE) | (kind == SPACE))] = _NOTHING
    table[_SOFT_HYPHEN] = _NOTHING
    table.setflags(write=False)
    return table


@compiled
def _normalize(
    points: Any, table: Any, out: Any, bounds: Any, starts: Any, ends: Any, hashes: Any
) -> int:
    """Write the words of a text; return their number."""
    count = 0
    length = 0
    last = 0
    state = _START
    inside = False
    for i in range(points.shape[0]):
        entry = table[points[i]]
        role = entry >> _ROLE_SHIFT
        point = entry & _POINT
        if role == _IN_WORD:
            if not inside:
                inside = True
                bounds[count] = length
                starts[count] = i
                state = _START
            state = state * _BASE + np.uint64(point)
            out[length] = point
            length += 1
            last = i
        elif role != _NOTHING:
            if inside:
                hashes[count] = mix(state)
                ends[count] = last + 1
                count += 1
                inside = False
            if role == _ALONE:
                bounds[count] = length
                starts[count] = i
                ends[count] = i + 1
                hashes[count] = mix(_START * _BASE + np.uint64(point))
                out[length] = point
                length += 1
                count += 1
    if inside:
        hashes[count] = mix(state)
        ends[count] = last + 1
        count += 1
    bounds[count] = length
    return count


def normal_words(text: str) -> NormalWords:
    """Return the words of a text as they are compared."""
    points = code_points(text)
    size = len(points)
    out = np.empty(size, dtype=np.uint32)
    bounds = np.empty(size + 1, dtype=np.int32)
    starts, ends = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
    hashes = np.empty(size, dtype=np.uint64)
    count = _normalize(points, _table(), out, bounds, starts, ends, hashes)
    return NormalWords(
        out[: bounds[count]], bounds[: count + 1], starts[:count], ends[:count], hashes[:count]
    )


@compiled
def _ngram_keys(hashes: Any, ngram: int, out: Any) -> None:
    """Write the hash of every n-gram: scrambled values of a polynomial in the word hashes."""
    state = np.uint64(0)
    power = np.uint64(1)
    for _ in range(ngram):
        power = power * _BASE
    for i in range(hashes.shape[0]):
        state = state * _BASE + hashes[i]
        if i >= ngram:
            state = state - hashes[i - ngram] * power
        if i + 1 >= ngram:
            out[i + 1 - ngram] = mix(state)


def ngram_keys(words: NormalWords, ngram: int) -> npt.NDArray[np.uint64]:
    """Return the hash of every n words in a row, uint64 [max(0, words - n + 1)]."""
    keys = np.empty(max(0, len(words.hashes) - ngram + 1), dtype=np.uint64)
    _ngram_keys(words.hashes, ngram, keys)
    return keys
