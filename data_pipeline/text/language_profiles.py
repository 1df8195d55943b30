"""langdetect's identifier, compiled: the same profiles, text rules, draws and arithmetic.

langdetect (Nakatani 2010) multiplies the language probabilities of n-grams drawn at random until
one language stands out, seven times over. Its draws start from the same seed for every text, so the
raw output of the generator is one fixed sequence, kept here as a table; profiles are read in the
order of their names, which langdetect leaves to the file system. Text rules and profiles are the
package's, and results are equal to its own in every bit.

    LanguageProfiles().best("Das ist ein ganz normaler Satz.")  # ('de', 0.9999...)
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from langdetect.detector import Detector
from langdetect.detector_factory import PROFILES_DIRECTORY
from langdetect.utils.ngram import NGram

from data_pipeline.compiled import compiled

_BITS = 21
_SPACE = 32
_TABLE_POINTS = 0x20000
"""Characters beyond this have no case and stay as they are."""
_DRAWS = 1 << 16
_MAX_CHARACTERS = 10_000
_TRIALS = 7
_ITERATIONS = 1000
_CONVERGED = 0.99999
_ALPHA, _ALPHA_WIDTH, _BASE_FREQUENCY = 0.5, 0.05, 10_000.0
_PROBABILITY_FLOOR = 0.1
_SPACES = re.compile(" {2,}")
_HASH = np.uint64(0x9E3779B97F4A7C15)
_U44 = np.uint64(44)


@compiled
def _fill(keys: Any, slots: Any, rows: Any) -> None:
    """Enter keys into an open-addressing table (0 = free)."""
    mask = np.uint64(slots.shape[0] - 1)
    for i in range(keys.shape[0]):
        slot = ((keys[i] * _HASH) >> _U44) & mask
        while slots[slot] != 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = keys[i]
        rows[slot] = i


@compiled
def _row(key: Any, slots: Any, rows: Any) -> Any:
    """Return the row of a key, -1 if it is not in the table."""
    mask = np.uint64(slots.shape[0] - 1)
    slot = ((key * _HASH) >> _U44) & mask
    while slots[slot] != 0:
        if slots[slot] == key:
            return rows[slot]
        slot = (slot + np.uint64(1)) & mask
    return np.int32(-1)


@compiled
def _ngrams(points: Any, normal: Any, upper: Any, slots: Any, rows: Any, out: Any) -> int:
    """Write the rows of the known 1- to 3-grams of a text in its order; return their number.

    White space is one character; no gram goes across it, and none ends in a run of capitals.
    """
    count = 0
    before = last = np.uint64(_SPACE)
    length = 1
    for i in range(points.shape[0]):
        point = np.uint64(points[i])
        if point < _TABLE_POINTS:
            point = np.uint64(normal[point])
        capital = (
            point < _TABLE_POINTS
            and last < _TABLE_POINTS
            and upper[point] != 0
            and upper[last] != 0
        )
        if last == np.uint64(_SPACE):
            length = 1
            if point == np.uint64(_SPACE):
                continue
        length = min(length + 1, 3)
        if not capital:
            if point != np.uint64(_SPACE):
                row = _row(point, slots, rows)
                if row >= 0:
                    out[count] = row
                    count += 1
            row = _row(last << np.uint64(_BITS) | point, slots, rows)
            if row >= 0:
                out[count] = row
                count += 1
            if length == 3:
                key = before << np.uint64(2 * _BITS) | last << np.uint64(_BITS) | point
                row = _row(key, slots, rows)
                if row >= 0:
                    out[count] = row
                    count += 1
        before, last = last, point
    return count


@compiled
def _normalize(p: Any) -> float:
    """Scale probabilities to a sum of one, summed in order; return the largest."""
    total = 0.0
    for j in range(p.shape[0]):
        total += p[j]
    largest = 0.0
    for j in range(p.shape[0]):
        p[j] /= total
        largest = max(largest, p[j])
    return largest


@compiled
def _uniform(draws: Any, at: int) -> float:
    """Return a number in [0, 1) from two draws, as the Mersenne Twister's users make it."""
    high = float(draws[at % _DRAWS] >> np.uint32(5))
    low = float(draws[(at + 1) % _DRAWS] >> np.uint32(6))
    return (high * 67108864.0 + low) / 9007199254740992.0


@compiled
def _detect(
    grams: Any, count: int, starts: Any, languages: Any, values: Any, draws: Any, result: Any
) -> None:
    """Write the mean over the trials of the language probabilities."""
    bits = 0
    while count >> bits:
        bits += 1
    shift = np.uint32(32 - bits)
    p = np.empty_like(result)
    row = np.zeros_like(result)
    result[:] = 0.0
    at = 0
    spare = 0.0
    for trial in range(_TRIALS):
        if trial % 2 == 0:
            angle = _uniform(draws, at) * 2.0 * np.pi
            radius = np.sqrt(-2.0 * np.log(1.0 - _uniform(draws, at + 2)))
            at += 4
            normal = np.cos(angle) * radius
            spare = np.sin(angle) * radius
        else:
            normal = spare
        weight = (_ALPHA + normal * _ALPHA_WIDTH) / _BASE_FREQUENCY
        p[:] = 1.0 / p.shape[0]
        i = 0
        while True:
            chosen = np.int64(count)
            while chosen >= count:
                chosen = np.int64(draws[at % _DRAWS] >> shift)
                at += 1
            gram = grams[chosen]
            for k in range(starts[gram], starts[gram + 1]):
                row[languages[k]] = values[k]
            for j in range(p.shape[0]):
                p[j] *= weight + row[j]
            for k in range(starts[gram], starts[gram + 1]):
                row[languages[k]] = 0.0
            if i % 5 == 0 and (_normalize(p) > _CONVERGED or i >= _ITERATIONS):
                break
            i += 1
        for j in range(p.shape[0]):
            result[j] += p[j] / _TRIALS


@compiled
def _without_latin(points: Any, out: Any) -> int:
    """Copy a text; leave out Latin letters where others are more than twice as many."""
    latin = other = 0
    for i in range(points.shape[0]):
        if 65 <= points[i] <= 122:
            latin += 1
        elif points[i] >= 0x300:
            other += 1
    count = 0
    for i in range(points.shape[0]):
        if latin * 2 >= other or not 65 <= points[i] <= 122:
            out[count] = points[i]
            count += 1
    return count


@dataclass(frozen=True, slots=True)
class _Grams:
    """The n-grams of all profiles; row i has languages[starts[i]:starts[i + 1]] with values."""

    slots: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    languages: npt.NDArray[np.uint8]
    values: npt.NDArray[np.float64]


def _key(gram: str) -> int:
    """Pack up to three characters into a number that is never 0."""
    key = 0
    for character in gram:
        key = key << _BITS | ord(character)
    return key


def _gather(profiles: Iterable[dict[str, Any]]) -> _Grams:
    """Sort the frequencies of all profiles by n-gram, then language."""
    entries = [
        (_key(gram), language, frequency / profile["n_words"][len(gram) - 1])
        for language, profile in enumerate(profiles)
        for gram, frequency in profile["freq"].items()
    ]
    entries.sort()
    keys, firsts = np.unique(np.array([e[0] for e in entries], np.uint64), return_index=True)
    slots = np.zeros(1 << 18, dtype=np.uint64)
    rows = np.zeros(1 << 18, dtype=np.int32)
    _fill(keys, slots, rows)
    return _Grams(
        slots=slots,
        rows=rows,
        starts=np.append(firsts, len(entries)).astype(np.int64),
        languages=np.array([e[1] for e in entries], np.uint8),
        values=np.array([e[2] for e in entries], np.float64),
    )


class LanguageProfiles:
    """The profiles of langdetect, ready to judge texts."""

    def __init__(self, folder: Path = Path(PROFILES_DIRECTORY), seed: int = 0) -> None:
        """Read every profile of a folder; ``seed`` starts the draws for every text."""
        profiles = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        ]
        self.languages: tuple[str, ...] = tuple(profile["name"] for profile in profiles)
        self._grams = _gather(profiles)
        generator = random.Random(seed)
        self._draws = np.array([generator.getrandbits(32) for _ in range(_DRAWS)], np.uint32)
        characters = [NGram.normalize(chr(point)) for point in range(_TABLE_POINTS)]
        self._normal = np.array([ord(character) for character in characters], np.uint32)
        self._upper = np.array([chr(point).isupper() for point in range(_TABLE_POINTS)], np.uint8)

    def probabilities(self, text: str) -> npt.NDArray[np.float64] | None:
        """Return the probability of every language, or None if the text has no known n-gram."""
        points = np.frombuffer(_prepared(text).encode("utf-32-le", "surrogatepass"), np.uint32)
        kept = np.empty_like(points)
        kept = kept[: _without_latin(points, kept)]
        grams = np.empty(3 * len(kept), dtype=np.int32)
        table = self._grams
        count = _ngrams(kept, self._normal, self._upper, table.slots, table.rows, grams)
        if count == 0:
            return None
        result = np.empty(len(self.languages), dtype=np.float64)
        _detect(grams, count, table.starts, table.languages, table.values, self._draws, result)
        return result

    def best(self, text: str) -> tuple[str, float]:
        """Return the most likely language with its probability; ("", 0.0) where none stands out."""
        found = self.probabilities(text)
        if found is None or found.max() <= _PROBABILITY_FLOOR:
            return "", 0.0
        return self.languages[int(found.argmax())], float(found.max())


def _prepared(text: str) -> str:
    """Take out addresses, compose Vietnamese letters, and cut to the length langdetect reads."""
    if "http" in text:
        text = Detector.URL_RE.sub(" ", text)
    if "@" in text:
        text = Detector.MAIL_RE.sub(" ", text)
    if not text.isascii():
        text = NGram.normalize_vi(text)
    return _SPACES.sub(" ", text[:_MAX_CHARACTERS])
