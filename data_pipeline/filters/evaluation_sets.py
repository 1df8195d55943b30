"""The n-grams of evaluation sets, looked up by hash and compared word by word.

An n-gram is a 64-bit hash in a sorted array beside its place in the examples; a hit counts only
where the words themselves are equal, so nothing is found that is not there.

    index = EvaluationIndex.build(read_examples("mmlu", files, ()), ngram=13)
    index.find(normal_words("some page")).words  # first words of the n-grams that are in examples
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.filters.block_lists import UNREADABLE, ListFile, check_digest, open_plain
from data_pipeline.text.normal_words import NormalWords, ngram_keys, normal_words
from llmtrain.errors import DataError

_JSON_LINES = frozenset({".jsonl", ".json", ".ndjson"})
_COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
_MOST_BYTES = (1 << 31) - 1
_SIEVE_BITS = 4
_SMALLEST_SIEVE, _LARGEST_SIEVE = 13, 30


class Example(NamedTuple):
    """One example of an evaluation set."""

    benchmark: str
    """Name of the evaluation set."""
    number: int
    """Place in the set, from 0."""
    text: str
    """Its fields, one after the other."""


class Hits(NamedTuple):
    """Where n-grams of a text stand in the examples; one entry per pair."""

    words: npt.NDArray[np.int64]
    """First word of the n-gram in the text, ascending."""
    places: npt.NDArray[np.int64]
    """First word of the n-gram in the words of all examples."""


def read_examples(
    benchmark: str, files: Sequence[ListFile], fields: Sequence[str]
) -> Iterator[Example]:
    """Yield the examples of an evaluation set.

    Raises:
        DataError: a file is damaged or has changed, or a row lacks a field.
    """
    number = 0
    for file in files:
        check_digest(file)
        path = Path(file.path)
        plain = Path(path.stem) if path.suffix in _COMPRESSED else path
        rows = _json_rows(path, fields) if plain.suffix in _JSON_LINES else _paragraphs(path)
        try:
            for text in rows:
                yield Example(benchmark, number, text)
                number += 1
        except (*UNREADABLE, ValueError) as error:
            raise DataError(
                f"{path}: example {number} of {benchmark} cannot be read ({error}); expected "
                "one JSON object per line, or UTF-8 text with an empty line between examples"
            ) from error
    if not number:
        names = ", ".join(file.path for file in files)
        raise DataError(f"the evaluation set {benchmark} has no example in {names}; check the path")


def _json_rows(path: Path, fields: Sequence[str]) -> Iterator[str]:
    with open_plain(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object")
            missing = [field for field in fields if field not in row]
            if missing:
                raise DataError(
                    f"{path}, line {number}, has no field {missing[0]!r}; its fields are "
                    f"{', '.join(map(str, row))}: change pipeline.decontaminate.fields"
                )
            yield "\n".join(_strings([row[field] for field in fields] if fields else row))


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with open_plain(path) as file:
        for raw in file:
            line = raw.decode("utf-8")
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines)
                lines = []
    if lines:
        yield "".join(lines)


@compiled
def _candidates(keys: Any, sieve: Any, shift: Any, index: Any, words: Any, lows: Any) -> int:
    """Write which keys are in a sorted index, and where they begin there; return their number."""
    count = 0
    for i in range(keys.shape[0]):
        bit = keys[i] >> shift
        if not sieve[bit >> np.uint64(3)] >> (bit & np.uint64(7)) & 1:
            continue
        low = 0
        high = index.shape[0]
        while low < high:
            middle = (low + high) >> 1
            if index[middle] < keys[i]:
                low = middle + 1
            else:
                high = middle
        if low < index.shape[0] and index[low] == keys[i]:
            words[count] = i
            lows[count] = low
            count += 1
    return count


@compiled
def _equal(
    letters: Any, bounds: Any, word: int, others: Any, other_bounds: Any, place: int, ngram: int
) -> bool:
    """Whether n words are equal, byte by byte."""
    for k in range(ngram):
        low = bounds[word + k]
        other = other_bounds[place + k]
        length = bounds[word + k + 1] - low
        if other_bounds[place + k + 1] - other != length:
            return False
        for j in range(length):
            if letters[low + j] != others[other + j]:
                return False
    return True


@compiled
def _verified(
    text: Any, examples: Any, words: Any, lows: Any, keys: Any, places: Any, ngram: int, out: Any
) -> int:
    """Write (word, place) of all candidates whose words are equal; return their number.

    With no room in ``out`` they are only counted.
    """
    count = 0
    for candidate in range(words.shape[0]):
        low = lows[candidate]
        key = keys[low]
        while low < keys.shape[0] and keys[low] == key:
            word, place = words[candidate], places[low]
            if _equal(text[0], text[1], word, examples[0], examples[1], place, ngram):
                if count < out.shape[0]:
                    out[count, 0] = word
                    out[count, 1] = place
                count += 1
            low += 1
    return count


def _sieve(keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint8], int]:
    """Return a bit for every value of the keys' first bits, and how many bits are left out."""
    bits = len(keys).bit_length() + _SIEVE_BITS
    shift = 64 - min(max(bits, _SMALLEST_SIEVE), _LARGEST_SIEVE)
    sieve = np.zeros(1 << (61 - shift), dtype=np.uint8)
    set_bits = keys >> np.uint64(shift)
    masks = (np.uint64(1) << (set_bits & np.uint64(7))).astype(np.uint8)
    np.bitwise_or.at(sieve, (set_bits >> np.uint64(3)).astype(np.int64), masks)
    return sieve, shift


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationIndex:
    """All n-grams of some examples."""

    ngram: int
    """Words in an n-gram."""
    keys: npt.NDArray[np.uint64]
    """Hashes of the n-grams, sorted, with repetitions."""
    places: npt.NDArray[np.int32]
    """First word of each in the words of all examples."""
    letters: npt.NDArray[np.uint8]
    """The words of all examples as UTF-8."""
    bounds: npt.NDArray[np.int32]
    """Where each word begins in ``letters``, and the end."""
    firsts: npt.NDArray[np.int64]
    """First word of every example, and the end, [examples + 1]."""
    examples: tuple[tuple[str, int], ...]
    """(benchmark, number) of every example."""
    sieve: npt.NDArray[np.uint8]
    """A bit for every value of the keys' first bits: whether any key begins like that."""
    shift: int
    """Bits of a key that the sieve leaves out."""

    @classmethod
    def build(cls, examples: Iterable[Example], ngram: int) -> "EvaluationIndex":
        """Return the index of examples; those with fewer words than n have no n-gram.

        Raises:
            DataError: the examples hold more than 2 GiB of words.
        """
        names: list[tuple[str, int]] = []
        letters, ends, keys, places = [], [], [], []
        firsts, size = [0], 0
        for example in examples:
            words = normal_words(example.text)
            own = ngram_keys(words, ngram)
            text, bounds = words.utf8()
            names.append((example.benchmark, example.number))
            letters.append(text)
            if size + len(text) > _MOST_BYTES:
                raise DataError(
                    f"the evaluation sets hold more than {_MOST_BYTES:,} bytes of words up to "
                    f"example {example.number} of {example.benchmark}; give fewer, or fewer fields"
                )
            ends.append((bounds[1:] + size).astype(np.int32))
            keys.append(own)
            places.append(np.arange(len(own), dtype=np.int32) + np.int32(firsts[-1]))
            firsts.append(firsts[-1] + len(words.hashes))
            size += len(text)
        joined = _joined(keys, np.uint64)
        order = np.argsort(joined, kind="stable")
        sieve, shift = _sieve(joined)
        return cls(
            ngram=ngram, keys=joined[order], places=_joined(places, np.int32)[order],
            letters=_joined(letters, np.uint8), sieve=sieve, shift=shift,
            bounds=np.concatenate([np.zeros(1, np.int32), *ends]),
            firsts=np.array(firsts, dtype=np.int64), examples=tuple(names),
        )  # fmt: skip

    def find(self, text: NormalWords) -> Hits:
        """Return every place in the examples where n words of a text stand."""
        keys = ngram_keys(text, self.ngram)
        words, lows = np.empty(len(keys), dtype=np.int64), np.empty(len(keys), dtype=np.int64)
        shift = np.uint64(self.shift)
        number = _candidates(keys, self.sieve, shift, self.keys, words, lows)
        if not number:
            return Hits(words[:0], lows[:0])
        candidates = (
            text.utf8(), (self.letters, self.bounds), words[:number], lows[:number], self.keys,
            self.places, self.ngram,
        )  # fmt: skip
        pairs = np.empty((_verified(*candidates, np.empty((0, 2), np.int64)), 2), dtype=np.int64)
        _verified(*candidates, pairs)
        return Hits(pairs[:, 0], pairs[:, 1])

    def example_at(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the example that each place is in."""
        found: npt.NDArray[np.int64] = np.searchsorted(self.firsts, places, side="right") - 1
        return found

    @property
    def ngrams(self) -> npt.NDArray[np.int64]:
        """N-grams of each example, [examples]."""
        numbers: npt.NDArray[np.int64] = np.maximum(np.diff(self.firsts) - self.ngram + 1, 0)
        return numbers
