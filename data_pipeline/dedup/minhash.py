"""MinHash signatures and the band keys under which near-duplicate documents meet.

Text is normalised by character (lower case, canonical decomposition without marks, every digit 0,
punctuation and symbols a space), cut into words, and into characters where a script sets no spaces
between words (Han, kana, Thai, Lao, Khmer, Myanmar). Every n consecutive words are a shingle; a
document with fewer is one shingle, so that short ones are found too. Shingles have 64-bit hashes;
a signature holds the minima of bands * rows permutations (a x + b) mod 2^32, a odd, of their upper
halves, which fill vector registers twice as well as 64 bits would: two shingles fall together once
in four thousand million pairs. Texts are read as UTF-8, as Arrow has them. All constants come from
SplitMix64 (doi:10.1145/2660193.2660195), so signatures are the same in every process and on every
machine. Two documents of Jaccard similarity s share a band with probability
1 - (1 - s^rows)^bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, section 3.4). A
band key has 64 bits.

    MinHasher("fineweb").band_keys(["some text", "another"])  # uint64 [2, 14]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.dedup.kernels import (
    GAMMA,
    U32,
    fold_bands,
    plain_units,
    shingle_hashes,
    sign,
    unit_hashes,
)
from data_pipeline.text.characters import CharacterTable
from data_pipeline.text.hashing import mix
from llmtrain.errors import ConfigError

UInt64Array = npt.NDArray[np.uint64]
UInt32Array = npt.NDArray[np.uint32]
UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]


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


def _constants(number: int, seed: int) -> UInt64Array:
    """Return the outputs of SplitMix64 from the module's seed: ``number`` of them for each seed."""
    first = seed * number + 1
    steps = np.arange(first, first + number, dtype=np.uint64) * GAMMA + _SEED
    return cast(UInt64Array, mix(steps))


class MinHasher:
    """Signatures and band keys of texts under one preset."""

    def __init__(self, preset: str | MinHashPreset, seed: int = 0) -> None:
        """Take a preset by name or value; ``seed`` other than 0 draws other permutations.

        Raises:
            ConfigError: there is no preset of this name.
        """
        if isinstance(preset, str):
            if preset not in MINHASH_PRESETS:
                known = ", ".join(sorted(MINHASH_PRESETS))
                raise ConfigError(f"minhash preset {preset!r} is not known; use one of {known}")
            preset = MINHASH_PRESETS[preset]
        self.preset = preset
        constants = (_constants(2 * preset.bands * preset.rows, seed) >> U32).astype(np.uint32)
        self._a = constants[0::2] | np.uint32(1)
        self._b = np.ascontiguousarray(constants[1::2])
        self._words = preset.unit == "word"
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

    def signatures(self, texts: Sequence[str] | pa.LargeStringArray) -> UInt32Array:
        """Return the signatures of texts, uint32 [N, bands * rows]."""
        text, ends = _arrow_texts(texts) if isinstance(texts, pa.Array) else _texts(texts)
        sizes = np.diff(ends)
        if not sizes.all():
            raise ValueError("an empty document has no shingles; drop it before MinHash")
        self._fit(int(sizes.max(initial=0)))
        out = np.empty((len(sizes), self.preset.bands * self.preset.rows), dtype=np.uint32)
        done = 0
        while True:
            done = sign(
                text, ends, done, self._words, self.preset.shingle, self._entries,
                self._table.expansions, self._units, self._shingles, self._halves,
                self._a, self._b, out,
            )  # fmt: skip
            if done == len(out):
                return out
            self._learn(text[ends[done] : ends[-1]])

    def band_keys(self, texts: Sequence[str] | pa.LargeStringArray) -> UInt64Array:
        """Return the keys of texts, uint64 [N, bands]; texts that share one are candidates.

        The band is part of what a key means.
        """
        out = np.empty((len(texts), self.preset.bands), dtype=np.uint64)
        fold_bands(self.signatures(texts), self.preset.rows, out)
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
            bytes_, ends = _texts([text])
            count = width = plain_units(bytes_, ends[0], ends[1], self._units)
        return self._shingles[: shingle_hashes(self._units, count, width, self._shingles)]

    def ngrams(self, text: str) -> UInt64Array:
        """Return the shingles of a text, none of one with fewer units than a shingle, uint64 [N].

        The array is the hasher's own and holds until the next text.
        """
        count = self._hash_units(text)
        if count < self.preset.shingle:
            return self._shingles[:0]
        number = shingle_hashes(self._units, count, self.preset.shingle, self._shingles)
        return self._shingles[:number]

    def _hash_units(self, text: str) -> int:
        """Hash the words or characters of a text; return their number."""
        content, ends = _texts([text])
        self._fit(len(content))
        while True:
            count: int = unit_hashes(
                content, ends[0], ends[1], self._words, self._entries, self._table.expansions,
                self._units,
            )  # fmt: skip
            if count >= 0:
                return count
            self._learn(content)

    def _fit(self, size: int) -> None:
        """Make room for the units of a text of so many bytes: no byte becomes three."""
        if len(self._units) < 2 * size + 1:
            self._reserve(4 * size)

    def _learn(self, text: UInt8Array) -> None:
        """Look up the characters of a text, in blocks of 256."""
        points = np.empty(len(text), dtype=np.uint32)
        number = plain_units(text, 0, len(text), points)
        blocks = np.flatnonzero(np.bincount(points[:number] >> np.uint32(8)))
        self._table.learn((blocks << 8).astype(np.uint32))
        self._entries = _pack(self._table)


def _texts(texts: Sequence[str]) -> tuple[UInt8Array, Int64Array]:
    """Return the UTF-8 of texts, one behind the other, and where each begins and the last ends."""
    parts = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=ends[1:])
    return np.frombuffer(b"".join(parts), dtype=np.uint8), ends


def _arrow_texts(texts: pa.LargeStringArray) -> tuple[UInt8Array, Int64Array]:
    """Return the same of an array, without copying it."""
    if not len(texts):
        return _texts([])
    _, ends, content = texts.buffers()
    own = np.frombuffer(ends, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(content or b"", dtype=np.uint8), own


def _pack(table: CharacterTable) -> UInt32Array:
    """Return kind << 24 | normalised code point for every code point."""
    return (table.kind.astype(np.uint32) << np.uint32(24)) | table.mapped
