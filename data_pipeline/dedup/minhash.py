"""MinHash signatures and the band keys under which near-duplicate documents meet.

Text is normalised by character (lower case, canonical decomposition without marks, every digit 0,
punctuation and symbols a space), cut into words, and into characters where a script sets no spaces
between words (Han, kana, Thai, Lao, Khmer, Myanmar). Every n consecutive words are a shingle; a
document with fewer is one shingle, so that short ones are found too. Shingles have 64-bit hashes;
a signature holds the minima of bands * rows permutations (a x + b) mod 2^32, a odd, of their upper
halves, which fill vector registers twice as well as 64 bits would: two shingles fall together once
in four thousand million pairs. All constants come from SplitMix64 (doi:10.1145/2660193.2660195),
so signatures are the same in every process and on every machine. Two documents of Jaccard
similarity s share a band with probability 1 - (1 - s^rows)^bands (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, section 3.4). A band key has 64 bits.

    MinHasher("fineweb").band_keys_batch(["some text", "another"])  # uint64 [2, 14]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.text.characters import DROP, EXPAND, LONE, SPACE, UNKNOWN, WORD, CharacterTable
from llmtrain.errors import ConfigError

UInt64Array = npt.NDArray[np.uint64]
UInt32Array = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class MinHashPreset:
    """Shingles and the banding of their signature."""

    unit: Literal["word", "character"]
    """What is counted: words, or characters of the normalised text, single spaces included."""
    shingle: int
    """Units in a shingle."""
    bands: int
    """Bands of a signature; one equal band makes two documents candidates."""
    rows: int
    """Minima in a band."""

    def probability(self, jaccard: float) -> float:
        """Return the probability that two documents of this similarity share a band."""
        return float(1.0 - (1.0 - jaccard**self.rows) ** self.bands)


MINHASH_PRESETS: Mapping[str, MinHashPreset] = {
    "fineweb": MinHashPreset(unit="word", shingle=5, bands=14, rows=8),
    "slimpajama": MinHashPreset(unit="character", shingle=13, bands=9, rows=13),
    "redpajama_v2": MinHashPreset(unit="word", shingle=13, bands=9, rows=13),
    "olmo": MinHashPreset(unit="word", shingle=5, bands=26, rows=11),
}
"""Shingles and banding of published corpora; normalisation and hashes are this module's."""

_SEED = np.uint64(0x6D696E68617368)
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_WORD_START = np.uint64(0xCBF29CE484222325)
_WORD_PRIME = np.uint64(0x100000001B3)
_U1, _U27, _U30, _U31, _U32 = (np.uint64(n) for n in (1, 27, 30, 31, 32))
_LOW24 = np.uint32(0xFFFFFF)
_BLANK = np.uint32(32)
_LARGEST = np.uint32(0xFFFFFFFF)


@compiled
def mix(x: Any) -> Any:
    """Scramble 64 bits: SplitMix64's output function."""
    x = (x ^ (x >> _U30)) * _MIX1
    x = (x ^ (x >> _U27)) * _MIX2
    return x ^ (x >> _U31)


@compiled
def _word_hashes(points: Any, table: Any, expansions: Any, out: Any) -> int:
    """Write the hash of every word of a text; return their number, -1 at an unknown character.

    ``table`` holds kind << 24 | normalised code point for every code point.
    """
    count = 0
    word = _WORD_START
    inside = False
    for i in range(points.shape[0]):
        entry = table[points[i]]
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
def _character_hashes(points: Any, table: Any, expansions: Any, out: Any) -> int:
    """Write the hash of every normalised character, single spaces between words included."""
    count = 0
    pending = False
    for i in range(points.shape[0]):
        entry = table[points[i]]
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
def _shingle_hashes(units: Any, count: int, shingle: int, out: Any) -> int:
    """Write the hash of every ``shingle`` consecutive unit hashes; return their number."""
    width = min(shingle, count)
    power = _U1
    rolling = np.uint64(0)
    for i in range(width):
        rolling = rolling * _GAMMA + units[i]
        if i:
            power *= _GAMMA
    salt = np.uint64(width) * _MIX1
    out[0] = mix(rolling ^ salt)
    for i in range(width, count):
        rolling = (rolling - units[i - width] * power) * _GAMMA + units[i]
        out[i - width + 1] = mix(rolling ^ salt)
    return count - width + 1


@compiled
def _minima(shingles: Any, count: int, halves: Any, a: Any, b: Any, out: Any) -> None:
    """Write the minimum of every permutation over shingle hashes; four at a time fill the core."""
    for i in range(count):
        halves[i] = np.uint32(shingles[i] >> _U32)
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
def _fold_bands(signature: Any, rows: int, out: Any) -> None:
    """Write one key per band of a signature; equal bands at different places get different keys."""
    for band in range(out.shape[0]):
        key = np.uint64(band + 1) * _GAMMA
        for row in range(rows):
            key = mix(key ^ np.uint64(signature[band * rows + row])) + _GAMMA
        out[band] = mix(key)


def _constants(number: int) -> UInt64Array:
    """Return the first outputs of SplitMix64 from the module's seed."""
    steps = np.arange(1, number + 1, dtype=np.uint64) * _GAMMA + _SEED
    mixed = (steps ^ (steps >> _U30)) * _MIX1
    mixed = (mixed ^ (mixed >> _U27)) * _MIX2
    return mixed ^ (mixed >> _U31)


class MinHasher:
    """Signatures and band keys of texts under one preset."""

    def __init__(self, preset: str | MinHashPreset) -> None:
        """Take a preset by name or value.

        Raises:
            ConfigError: there is no preset of this name.
        """
        if isinstance(preset, str):
            if preset not in MINHASH_PRESETS:
                known = ", ".join(sorted(MINHASH_PRESETS))
                raise ConfigError(f"minhash preset {preset!r} is not known; use one of {known}")
            preset = MINHASH_PRESETS[preset]
        self.preset = preset
        constants = (_constants(2 * preset.bands * preset.rows) >> _U32).astype(np.uint32)
        self._a = constants[0::2] | np.uint32(1)
        self._b = np.ascontiguousarray(constants[1::2])
        self._table = CharacterTable()
        self._entries = _pack(self._table)
        self._reserve(1 << 16)

    def _reserve(self, units: int) -> None:
        self._units = np.empty(units, dtype=np.uint64)
        self._shingles = np.empty(units, dtype=np.uint64)
        self._halves = np.empty(units, dtype=np.uint32)

    def signature(self, text: str) -> UInt32Array:
        """Return the minima of a text, uint32 [bands * rows].

        Raises:
            ValueError: the text is empty; such documents are dropped before.
        """
        return cast(UInt32Array, self.signatures([text])[0])

    def signatures(self, texts: Sequence[str]) -> UInt32Array:
        """Return the signatures of texts, uint32 [N, bands * rows]."""
        out = np.empty((len(texts), self.preset.bands * self.preset.rows), dtype=np.uint32)
        for row, text in zip(out, texts, strict=True):
            self._sign(text, row)
        return out

    def band_keys(self, text: str) -> UInt64Array:
        """Return the keys of a text, uint64 [bands]; texts that share one are candidates."""
        return cast(UInt64Array, self.band_keys_batch([text])[0])

    def band_keys_batch(self, texts: Sequence[str]) -> UInt64Array:
        """Return the keys of texts, uint64 [N, bands]; the band is part of what a key means."""
        signature = np.empty(self.preset.bands * self.preset.rows, dtype=np.uint32)
        out = np.empty((len(texts), self.preset.bands), dtype=np.uint64)
        for row, text in zip(out, texts, strict=True):
            self._sign(text, signature)
            _fold_bands(signature, self.preset.rows, row)
        return out

    def shingles(self, text: str) -> UInt64Array:
        """Return the hashes of the text's shingles in their order, repeats included, uint64 [N].

        The array is the hasher's own and holds until the next text.

        Raises:
            ValueError: the text is empty.
        """
        if not text:
            raise ValueError("an empty document has no shingles; drop it before MinHash")
        count, width = self._hash_units(text), self.preset.shingle
        if count == 0:  # nothing but punctuation: only the same text is its duplicate
            points = _points(text)
            self._units[: len(points)] = points
            count = width = len(points)
        return self._shingles[: _shingle_hashes(self._units, count, width, self._shingles)]

    def ngrams(self, text: str) -> UInt64Array:
        """Return the shingles of a text, none of one with fewer units than a shingle, uint64 [N].

        The array is the hasher's own and holds until the next text.
        """
        count = self._hash_units(text)
        if count < self.preset.shingle:
            return self._shingles[:0]
        number = _shingle_hashes(self._units, count, self.preset.shingle, self._shingles)
        return self._shingles[:number]

    def _hash_units(self, text: str) -> int:
        """Hash the words or characters of a text; return their number."""
        points = _points(text)
        if len(self._units) < 4 * len(points) + 1:
            self._reserve(8 * len(points))
        hashes = _word_hashes if self.preset.unit == "word" else _character_hashes
        count: int = hashes(points, self._entries, self._table.expansions, self._units)
        if count < 0:
            self._table.learn(points)
            self._entries = _pack(self._table)
            count = hashes(points, self._entries, self._table.expansions, self._units)
        return count

    def _sign(self, text: str, out: UInt32Array) -> None:
        """Write the signature of a text."""
        shingles = self.shingles(text)
        _minima(shingles, len(shingles), self._halves, self._a, self._b, out)


def _points(text: str) -> UInt32Array:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _pack(table: CharacterTable) -> UInt32Array:
    """Return kind << 24 | normalised code point for every code point."""
    return (table.kind.astype(np.uint32) << np.uint32(24)) | table.mapped
