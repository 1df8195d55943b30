"""What MinHash computes of every text, compiled: units, shingles, minima and band keys.

Texts are UTF-8, one behind the other, so that a batch is signed in one call without an object for
each. ``minhash.py`` says what the numbers mean; they are part of stored keys and never change.

    done = sign(text, ends, 0, True, 5, table, expansions, units, shingles, halves, a, b, out)
"""

from typing import Any

import numpy as np

from data_pipeline.compiled import compiled
from data_pipeline.text.characters import DROP, EXPAND, LONE, SPACE, UNKNOWN, WORD
from data_pipeline.text.hashing import MIX1, mix

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_WORD_START = np.uint64(0xCBF29CE484222325)
_WORD_PRIME = np.uint64(0x100000001B3)
_U1, U32 = np.uint64(1), np.uint64(32)
_LOW24 = np.uint32(0xFFFFFF)
_BLANK = np.uint32(32)
_LARGEST = np.uint32(0xFFFFFFFF)


@compiled
def _decode(text: Any, i: int) -> Any:
    """Return (code point at a place of valid UTF-8, place of the next)."""
    lead = np.uint32(text[i])
    if lead < 0x80:
        return lead, i + 1
    second = np.uint32(text[i + 1] & 0x3F)
    if lead < 0xE0:
        return ((lead & np.uint32(0x1F)) << np.uint32(6)) | second, i + 2
    third = np.uint32(text[i + 2] & 0x3F)
    if lead < 0xF0:
        high = ((lead & np.uint32(0x0F)) << np.uint32(12)) | (second << np.uint32(6))
        return high | third, i + 3
    high = ((lead & np.uint32(0x07)) << np.uint32(18)) | (second << np.uint32(12))
    return high | (third << np.uint32(6)) | np.uint32(text[i + 3] & 0x3F), i + 4


@compiled
def _word_hashes(text: Any, start: int, end: int, table: Any, expansions: Any, out: Any) -> int:
    """Write the hash of every word of text[start:end]; return their number, -1 if one is unknown.

    ``table`` holds kind << 24 | normalised code point for every code point.
    """
    count = 0
    word = _WORD_START
    inside = False
    i = start
    while i < end:
        point, i = _decode(text, i)
        entry = table[point]
        first = entry & _LOW24
        kinds = entry >> np.uint32(24)
        if kinds == WORD:
            word = (word ^ np.uint64(first)) * _WORD_PRIME
            inside = True
            continue
        if kinds == UNKNOWN:
            return -1
        parts = 1
        if kinds == EXPAND:
            parts = expansions[first, 0]
        for part in range(parts):
            point = first
            each = kinds
            if kinds == EXPAND:
                point = expansions[first, part + 1]
                each = table[point] >> np.uint32(24)
            if each == DROP:
                continue
            if inside and each != WORD:
                out[count] = mix(word)
                count += 1
                word = _WORD_START
                inside = False
            if each == LONE:
                out[count] = mix((_WORD_START ^ np.uint64(point)) * _WORD_PRIME)
                count += 1
            elif each != SPACE:
                word = (word ^ np.uint64(point)) * _WORD_PRIME
                inside = True
    if inside:
        out[count] = mix(word)
        count += 1
    return count


@compiled
def _character_hashes(
    text: Any, start: int, end: int, table: Any, expansions: Any, out: Any
) -> int:
    """Write the hash of every normalised character, single spaces between words included."""
    count = 0
    pending = False
    i = start
    while i < end:
        point, i = _decode(text, i)
        entry = table[point]
        first = entry & _LOW24
        kinds = entry >> np.uint32(24)
        if kinds == UNKNOWN:
            return -1
        parts = 1
        if kinds == EXPAND:
            parts = expansions[first, 0]
        for part in range(parts):
            point = first
            each = kinds
            if kinds == EXPAND:
                point = expansions[first, part + 1]
                each = table[point] >> np.uint32(24)
            if each == DROP:
                continue
            if each == SPACE:
                pending = count > 0
                continue
            if pending:
                out[count] = mix((_WORD_START ^ np.uint64(_BLANK)) * _WORD_PRIME)
                count += 1
                pending = False
            out[count] = mix((_WORD_START ^ np.uint64(point)) * _WORD_PRIME)
            count += 1
    return count


@compiled
def unit_hashes(
    text: Any, start: int, end: int, words: bool, table: Any, expansions: Any, out: Any
) -> int:
    """Write the hash of every word or character; return their number, -1 if one is unknown."""
    if words:
        return int(_word_hashes(text, start, end, table, expansions, out))
    return int(_character_hashes(text, start, end, table, expansions, out))


@compiled
def plain_units(text: Any, start: int, end: int, out: Any) -> int:
    """Write the code points of a text as they are; return their number."""
    count = 0
    while start < end:
        out[count], start = _decode(text, start)
        count += 1
    return count


@compiled
def shingle_hashes(units: Any, count: int, shingle: int, out: Any) -> int:
    """Write the hash of every ``shingle`` consecutive unit hashes; return their number."""
    width = min(shingle, count)
    power = _U1
    rolling = np.uint64(0)
    for i in range(width):
        rolling = rolling * GAMMA + units[i]
        if i:
            power *= GAMMA
    salt = np.uint64(width) * MIX1
    out[0] = mix(rolling ^ salt)
    for i in range(width, count):
        rolling = (rolling - units[i - width] * power) * GAMMA + units[i]
        out[i - width + 1] = mix(rolling ^ salt)
    return count - width + 1


@compiled
def _minima(shingles: Any, count: int, halves: Any, a: Any, b: Any, out: Any) -> None:
    """Write the minimum of every permutation over shingle hashes; four at a time fill the core."""
    for i in range(count):
        halves[i] = np.uint32(shingles[i] >> U32)
    number = out.shape[0]
    for k in range(0, number, 4):
        k1, k2, k3 = min(k + 1, number - 1), min(k + 2, number - 1), min(k + 3, number - 1)
        a0, a1, a2, a3 = a[k], a[k1], a[k2], a[k3]
        b0, b1, b2, b3 = b[k], b[k1], b[k2], b[k3]
        low0 = low1 = low2 = low3 = _LARGEST
        for i in range(count):
            x = halves[i]
            low0 = min(low0, np.uint32(a0 * x + b0))
            low1 = min(low1, np.uint32(a1 * x + b1))
            low2 = min(low2, np.uint32(a2 * x + b2))
            low3 = min(low3, np.uint32(a3 * x + b3))
        out[k], out[k1], out[k2], out[k3] = low0, low1, low2, low3


@compiled
def sign(
    text: Any, ends: Any, first: int, words: bool, width: int, table: Any, expansions: Any,
    units: Any, shingles: Any, halves: Any, a: Any, b: Any, out: Any,
) -> int:  # fmt: skip
    """Write the signatures of texts from the first on; return where a character is unknown.

    Text i is text[ends[i]:ends[i + 1]].
    """
    for i in range(first, out.shape[0]):
        start, end = ends[i], ends[i + 1]
        count = unit_hashes(text, start, end, words, table, expansions, units)
        if count < 0:
            return i
        together = width
        if count == 0:
            count = together = plain_units(text, start, end, units)
        number = shingle_hashes(units, count, together, shingles)
        _minima(shingles, number, halves, a, b, out[i])
    return int(out.shape[0])


@compiled
def fold_bands(signatures: Any, rows: int, out: Any) -> None:
    """Write one key per band of signatures; equal bands at different places get different keys."""
    for i in range(out.shape[0]):
        for band in range(out.shape[1]):
            key = np.uint64(band + 1) * GAMMA
            for row in range(rows):
                key = mix(key ^ np.uint64(signatures[i, band * rows + row])) + GAMMA
            out[i, band] = mix(key)
