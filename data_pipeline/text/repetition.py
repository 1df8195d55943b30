r"""Kernels that count what a text says more than once: lines, paragraphs, n-grams of words.

Pieces are compared by 64-bit hashes: two that differ are taken for one with a probability of about
2^-64. The values of an n-gram come from sums over the words before it: ``joined`` values see only
the characters of its words run together, so that "a bc" and "ab c" are one, ``sequence`` values see
the words. Where most n-grams stand once, a filter of one byte per position finds those first.

    lines = segments(code_points("a\n\nb\na"), 0, 6, 1)     # hashes and lengths of a, b, a
    duplicates(*lines)                                      # (1, 1): one line, one character
"""

from typing import Any

import numpy as np

from data_pipeline.compiled import compiled
from data_pipeline.text.hashing import mix
from data_pipeline.text.words import BASE, hash_points

_NEWLINE = 10
_ONE = np.uint64(1)
_INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
_TABLED = 16
_POWERS = np.array([pow(int(BASE), k, 1 << 64) for k in range(_TABLED + 1)], dtype=np.uint64)
_INVERSES = np.array([pow(int(BASE), -k, 1 << 64) for k in range(_TABLED + 1)], dtype=np.uint64)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


@compiled
def segments(points: Any, start: int, end: int, newlines: int) -> Any:
    """Cut points[start:end] at runs of at least so many newlines.

    Returns the hashes, uint64, and lengths, int64, of the pieces; pieces may be empty, as when
    Python's ``re`` splits.
    """
    breaks = 1
    for i in range(start, end):
        breaks += points[i] == _NEWLINE
    hashes = np.empty(breaks, dtype=np.uint64)
    lengths = np.empty(breaks, dtype=np.int64)
    count = 0
    begin = i = start
    while i <= end:
        while i < end and points[i] != _NEWLINE:
            i += 1
        run = 0
        while i + run < end and points[i + run] == _NEWLINE:
            run += 1
        if i == end or run >= newlines:
            hashes[count] = hash_points(points, begin, i)
            lengths[count] = i - begin
            count += 1
            begin = i + run
        i += max(run, 1)
    return hashes[:count], lengths[:count]


@compiled
def _bits(entries: int) -> int:
    """Return the bits of a slot's number in a table of at least twice as many slots."""
    bits = 3
    while (1 << bits) < 2 * entries:
        bits += 1
    return bits


@compiled
def _entry(slots: Any, shift: Any, keys: Any, key: Any, number: int) -> Any:
    """Return the entry of a key; ``number`` becomes its entry if it is new."""
    slot: Any = np.int64((key * _SPREAD) >> shift)
    while slots[slot] >= 0:
        if keys[slots[slot]] == key:
            return slots[slot]
        slot = slot + 1 if slot + 1 < slots.shape[0] else 0
    slots[slot] = number
    keys[number] = key
    return number


@compiled
def duplicates(hashes: Any, lengths: Any) -> Any:
    """Return (pieces, characters) that stood before, after their first occurrence."""
    bits = _bits(hashes.shape[0])
    shift = np.uint64(64 - bits)
    slots = np.full(1 << bits, -1, dtype=np.int32)
    keys = np.empty(hashes.shape[0], dtype=np.uint64)
    entries = pieces = characters = 0
    for i in range(hashes.shape[0]):
        if _entry(slots, shift, keys, hashes[i], entries) < entries:
            pieces += 1
            characters += lengths[i]
        else:
            entries += 1
    return pieces, characters


@compiled
def prefixes(starts: Any, ends: Any, sums: Any) -> Any:
    """Return running sums over words, from which the values of any n-gram follow.

    Returns:
        sizes: int64 [words + 1], characters before each word.
        joined: uint64 [2, words + 1], sum of polynomials of words x base^-(characters so far), and
            base^(characters so far).
        sequence: uint64 [2, words + 1], the same of well mixed words and their number.
    """
    count = starts.shape[0]
    sizes = np.zeros(count + 1, dtype=np.int64)
    joined = np.zeros((2, count + 1), dtype=np.uint64)
    sequence = np.zeros((2, count + 1), dtype=np.uint64)
    power = inverse = word_power = word_inverse = _ONE
    joined[1, 0] = sequence[1, 0] = _ONE
    for k in range(count):
        length = ends[k] - starts[k]
        for _ in range(length // _TABLED):
            power *= _POWERS[_TABLED]
            inverse *= _INVERSES[_TABLED]
        power *= _POWERS[length % _TABLED]
        inverse *= _INVERSES[length % _TABLED]
        word_power *= BASE
        word_inverse *= _INVERSE
        sizes[k + 1] = sizes[k] + length
        joined[0, k + 1] = joined[0, k] + sums[k] * inverse
        joined[1, k + 1] = power
        word = mix(sums[k] + np.uint64(length))
        sequence[0, k + 1] = sequence[0, k] + word * word_inverse
        sequence[1, k + 1] = word_power
    return sizes, joined, sequence


@compiled
def _value(sums: Any, powers: Any, k: int, n: int) -> Any:
    """Return the value of the words k to k + n - 1."""
    return (sums[k + n] - sums[k]) * powers[k + n]


@compiled
def _scratch(most: int) -> Any:
    """Return (shift, filter shift, filter, slots, keys) to look up so many n-grams."""
    bits = _bits(most)
    seen = np.empty(4 << bits, dtype=np.uint8)
    slots = np.empty(1 << bits, dtype=np.int32)
    keys = np.empty(most, dtype=np.uint64)
    return np.uint64(64 - bits), np.uint64(62 - bits), seen, slots, keys


@compiled
def _twice(sums: Any, powers: Any, n: int, total: int, shift: Any, seen: Any) -> None:
    """Count values per place of a filter, up to 2; one that stands alone is unique for certain."""
    for k in range(seen.shape[0]):
        seen[k] = 0
    for k in range(total):
        place = np.int64((_value(sums, powers, k, n) * _SPREAD) >> shift)
        seen[place] = min(seen[place] + 1, 2)


@compiled
def top_ngrams(sizes: Any, sequence: Any, first: int, last: int, longest: bool) -> Any:
    """Return [occurrences, characters of one, separators aside] of the top n-grams, n by n.

    Of equally frequent ones the first counts, or with ``longest`` the longest, if any stands twice;
    0 where a text has fewer words than n.
    """
    result = np.zeros((last - first + 1, 2), dtype=np.int64)
    most = max(sizes.shape[0] - first, 0)
    shift, filter_shift, seen, slots, keys = _scratch(most)
    counts = np.empty(most, dtype=np.int32)
    lengths = np.empty(most, dtype=np.int64)
    sums, powers = sequence[0], sequence[1]
    for n in range(first, last + 1):
        total = sizes.shape[0] - n
        if total <= 0:
            break
        _twice(sums, powers, n, total, filter_shift, seen)
        slots[:] = -1
        entries = 0
        for k in range(total):
            value = _value(sums, powers, k, n)
            if seen[np.int64((value * _SPREAD) >> filter_shift)] < 2:
                continue
            entry = _entry(slots, shift, keys, value, entries)
            if entry == entries:
                entries += 1
                counts[entry] = 0
                lengths[entry] = sizes[k + n] - sizes[k]
            counts[entry] += 1
        best = -1
        for entry in range(entries):
            if (
                best < 0
                or counts[entry] > counts[best]
                or (longest and counts[entry] == counts[best] and lengths[entry] > lengths[best])
            ):
                best = entry
        several = best >= 0 and counts[best] > 1
        result[n - first, 0] = counts[best] if several else 1
        result[n - first, 1] = lengths[best] if several else sizes[n]
    return result


@compiled
def duplicate_ngrams(sizes: Any, joined: Any, first: int, last: int) -> Any:
    """Return the characters, separators aside, of n-grams that stood before, n by n.

    From left to right: an n-gram whose characters stood before counts and is stepped over as a
    whole, any other is remembered and the next begins one word later.
    """
    result = np.zeros(last - first + 1, dtype=np.int64)
    most = max(sizes.shape[0] - first, 0)
    shift, filter_shift, seen, slots, keys = _scratch(most)
    sums, powers = joined[0], joined[1]
    for n in range(first, last + 1):
        total = sizes.shape[0] - n
        if total <= 0:
            break
        _twice(sums, powers, n, total, filter_shift, seen)
        slots[:] = -1
        entries = k = 0
        while k < total:
            value = _value(sums, powers, k, n)
            if seen[np.int64((value * _SPREAD) >> filter_shift)] < 2:
                k += 1
                continue
            size = sizes[k + n] - sizes[k]
            if _entry(slots, shift, keys, value + np.uint64(size), entries) < entries:
                result[n - first] += size
                k += n
            else:
                entries += 1
                k += 1
    return result


@compiled
def covered_characters(sizes: Any, sequence: Any, first: int, last: int) -> Any:
    """Return the characters of all words inside an n-gram that stands at least twice, n by n."""
    result = np.zeros(last - first + 1, dtype=np.int64)
    most = max(sizes.shape[0] - first, 0)
    shift, filter_shift, seen, slots, keys = _scratch(most)
    counts = np.empty(most, dtype=np.int32)
    entry_of = np.empty(most, dtype=np.int32)
    sums, powers = sequence[0], sequence[1]
    for n in range(first, last + 1):
        total = sizes.shape[0] - n
        if total <= 0:
            break
        _twice(sums, powers, n, total, filter_shift, seen)
        slots[:] = -1
        entries = 0
        for k in range(total):
            value = _value(sums, powers, k, n)
            entry_of[k] = -1
            if seen[np.int64((value * _SPREAD) >> filter_shift)] < 2:
                continue
            entry = _entry(slots, shift, keys, value, entries)
            if entry == entries:
                entries += 1
                counts[entry] = 0
            counts[entry] += 1
            entry_of[k] = entry
        done = 0
        for k in range(total):
            if entry_of[k] >= 0 and counts[entry_of[k]] > 1:
                result[n - first] += sizes[k + n] - sizes[max(done, k)]
                done = k + n
    return result
