"""MinHash signatures and the band keys under which near-duplicate documents meet.

Text is normalised by character (lower case, canonical decomposition without marks, every digit 0,
punctuation and symbols a space), cut into words, and into characters where a script sets no spaces
between words (Han, kana, Thai, Lao, Khmer, Myanmar). Every n consecutive words are a shingle; a
document with fewer is one shingle, so that short ones are found too. A signature holds the minima
of bands * rows permutations (a x + b) mod 2^64, a odd, of the 64-bit shingle hashes; all constants
come from SplitMix64 (doi:10.1145/2660193.2660195), so signatures are the same in every process and
on every machine. Two documents of Jaccard similarity s share a band with probability
1 - (1 - s^rows)^bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4).

    MinHasher("fineweb").band_keys_batch(["some text", "another"])  # uint64 [2, 14]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from data_pipeline.characters import EXPAND, LONE, SPACE, UNKNOWN, WORD, CharacterTable
from data_pipeline.compiled import compiled
from llmtrain.errors import ConfigError

UInt64Array = npt.NDArray[np.uint64]


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
_BLANK = np.uint32(32)
_LARGEST = np.uint64(0xFFFFFFFFFFFFFFFF)


@compiled
def _mix(x: Any) -> Any:
    """Scramble 64 bits: SplitMix64's output function."""
    x = (x ^ (x >> _U30)) * _MIX1
    x = (x ^ (x >> _U27)) * _MIX2
    return x ^ (x >> _U31)


@compiled
def _word_hashes(points: Any, kind: Any, mapped: Any, expansions: Any, out: Any) -> int:
    """Write the hash of every word of a text; return their number, -1 at an unknown character."""
    count = 0
    word = _WORD_START
    inside = False
    for i in range(points.shape[0]):
        first = mapped[points[i]]
        kinds = kind[points[i]]
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
                each = kind[point]
            if each == 0:
                continue
            if inside and each != WORD:
                out[count] = _mix(word)
                count += 1
                word = _WORD_START
                inside = False
            if each == LONE:
                out[count] = _mix((_WORD_START ^ np.uint64(point)) * _WORD_PRIME)
                count += 1
            elif each != SPACE:
                word = (word ^ np.uint64(point)) * _WORD_PRIME
                inside = True
    if inside:
        out[count] = _mix(word)
        count += 1
    return count


@compiled
def _character_hashes(points: Any, kind: Any, mapped: Any, expansions: Any, out: Any) -> int:
    """Write the hash of every normalised character, single spaces between words included."""
    count = 0
    pending = False
    for i in range(points.shape[0]):
        first = mapped[points[i]]
        kinds = kind[points[i]]
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
                each = kind[point]
            if each == 0:
                continue
            if each == SPACE:
                pending = count > 0
                continue
            if pending:
                out[count] = _mix((_WORD_START ^ np.uint64(_BLANK)) * _WORD_PRIME)
                count += 1
                pending = False
            out[count] = _mix((_WORD_START ^ np.uint64(point)) * _WORD_PRIME)
            count += 1
    return count


@compiled
def _minima(units: Any, count: int, shingle: int, a: Any, b: Any, out: Any) -> None:
    """Write the minimum of every permutation over the shingles of ``count`` unit hashes."""
    for k in range(out.shape[0]):
        out[k] = _LARGEST
    width = min(shingle, count)
    for start in range(count - width + 1):
        x = np.uint64(width)
        for i in range(start, start + width):
            x = ((x << _U27) | (x >> np.uint64(37))) ^ units[i]
            x = x * _GAMMA
        x = _mix(x)
        for k in range(out.shape[0]):
            value = a[k] * x + b[k]
            out[k] = min(out[k], value)


@compiled
def _fold_bands(signature: Any, rows: int, out: Any) -> None:
    """Write one key per band of a signature; equal bands at different places get different keys."""
    for band in range(out.shape[0]):
        key = np.uint64(band + 1) * _GAMMA
        for row in range(rows):
            key = _mix(key ^ signature[band * rows + row]) + _GAMMA
        out[band] = _mix(key)


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
        constants = _constants(2 * preset.bands * preset.rows)
        self._a = constants[0::2] | _U1
        self._b = np.ascontiguousarray(constants[1::2])
        self._table = CharacterTable()
        self._units = np.empty(1 << 16, dtype=np.uint64)

    def signature(self, text: str) -> UInt64Array:
        """Return the minima of a text, uint64 [bands * rows].

        Raises:
            ValueError: the text is empty; such documents are dropped before.
        """
        out = np.empty(self.preset.bands * self.preset.rows, dtype=np.uint64)
        self._sign(text, out)
        return out

    def signatures(self, texts: Sequence[str]) -> UInt64Array:
        """Return the signatures of texts, uint64 [N, bands * rows]."""
        out = np.empty((len(texts), self.preset.bands * self.preset.rows), dtype=np.uint64)
        for row, text in zip(out, texts, strict=True):
            self._sign(text, row)
        return out

    def band_keys(self, text: str) -> UInt64Array:
        """Return the keys of a text, uint64 [bands]; texts that share one are candidates."""
        return cast(UInt64Array, self.band_keys_batch([text])[0])

    def band_keys_batch(self, texts: Sequence[str]) -> UInt64Array:
        """Return the keys of texts, uint64 [N, bands]; the band is part of what a key means."""
        signature = np.empty(self.preset.bands * self.preset.rows, dtype=np.uint64)
        out = np.empty((len(texts), self.preset.bands), dtype=np.uint64)
        for row, text in zip(out, texts, strict=True):
            self._sign(text, signature)
            _fold_bands(signature, self.preset.rows, row)
        return out

    def _sign(self, text: str, out: UInt64Array) -> None:
        """Write the signature of a text."""
        if not text:
            raise ValueError("an empty document has no signature; drop it before MinHash")
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        if len(self._units) < 4 * len(points) + 1:
            self._units = np.empty(8 * len(points), dtype=np.uint64)
        hashes = _word_hashes if self.preset.unit == "word" else _character_hashes
        table = self._table
        count = hashes(points, table.kind, table.mapped, table.expansions, self._units)
        if count < 0:
            table.learn(points)
            count = hashes(points, table.kind, table.mapped, table.expansions, self._units)
        if count == 0:  # nothing but punctuation: only the same text is its duplicate
            self._units[: len(points)] = points
            count = len(points)
            _minima(self._units, count, count, self._a, self._b, out)
            return
        _minima(self._units, count, self.preset.shingle, self._a, self._b, out)
