r"""Pages with listed words: at the first one as in C4, or from a share of the words upwards.

C4 looks for ``(?:\W|^)(word|...)(?:\W|$)`` in the lower-cased text, and for the words anywhere in
Japanese, Thai and Chinese (arXiv:1910.10683; TensorFlow Datasets c4 3.0.1). Here every run of word
characters is hashed in one pass and only hits are compared, with the same result. The lists are the
user's: a file for one language, or a folder with one for each. A document whose language nobody has
identified is tested with the list of ``language``.

    BadWords(lists=(("en", ListFile(path, digest)),), language="en")(document)
"""

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.compiled import compiled
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.block_lists import ListFile, entries, file_digest
from data_pipeline.step import Dropped, Finding, Kept, StepKind, Verdict
from data_pipeline.text.code_points import ALPHANUMERIC, code_points, properties
from data_pipeline.text.hashing import mix
from data_pipeline.text.letter_case import lower_case
from llmtrain.errors import DataError

_UNSPACED = frozenset({"ja", "th", "zh"})
_LANGUAGE_FILE = re.compile(r"([a-z]{2,3})(?:[-_][A-Za-z]+)?(?:\.txt)?(?:\.gz)?")
_RUN = re.compile(r"\w+")
_SPLITS_IN_TWO = "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}"
_BASE = np.uint64(0x9E3779B97F4A7C15)


def word_lists(path: str, language: str) -> tuple[tuple[str, ListFile], ...]:
    """Return (language, file) of each list: of a folder all that are named after a language.

    Raises:
        DataError: there is no such file, or the folder holds no list.
    """
    given = Path(path)
    if given.is_dir():
        found = [
            (match[1], file)
            for file in sorted(given.iterdir())
            if file.is_file() and (match := _LANGUAGE_FILE.fullmatch(file.name))
        ]
        if not found:
            raise DataError(
                f"the folder {given} holds no list of bad words; put files named en.txt, de.txt "
                "and so on there, one word per line, or give one file"
            )
    elif given.is_file():
        found = [(language, given)]
    else:
        raise DataError(
            f"the list of bad words {given} cannot be read: there is no such file; expected a "
            "UTF-8 text file with one word per line: give another path, or leave the list out"
        )
    return tuple((name, ListFile(str(file), file_digest(file))) for name, file in found)


@functools.cache
def _table() -> npt.NDArray[np.uint32]:
    """Return the lower case of every word character, 0 for all other code points."""
    word = (properties() & ALPHANUMERIC) != 0
    word[ord("_")] = True
    table = np.where(word, lower_case(), np.uint32(0))
    table.setflags(write=False)
    return table


@compiled
def _run_key(points: Any, table: Any) -> Any:
    """Return the key of a run of word characters in hash tables; never 0."""
    key = np.uint64(0)
    for point in points:
        key = key * _BASE + np.uint64(table[point])
    return mix(key) | np.uint64(1)


@compiled
def _listed(points: Any, table: Any, keys: Any, starts: Any, numbers: Any) -> Any:
    """Write start and number of every run of word characters whose hash is among the keys.

    Returns (runs, hits); ``keys`` is an open hash table with zeros where it is empty.
    """
    runs = 0
    hits = 0
    start = -1
    key = np.uint64(0)
    slots = np.uint64(keys.shape[0] - 1)
    for i in range(points.shape[0] + 1):
        point = table[points[i]] if i < points.shape[0] else np.uint32(0)
        if point != 0:
            if start < 0:
                start = i
                key = np.uint64(0)
            key = key * _BASE + np.uint64(point)
        elif start >= 0:
            key = mix(key) | np.uint64(1)
            slot = key >> np.uint64(1) & slots
            while keys[slot] != 0 and keys[slot] != key:
                slot = (slot + np.uint64(1)) & slots
            if keys[slot] == key:
                starts[hits] = start
                numbers[hits] = runs
                hits += 1
            runs += 1
            start = -1
    return runs, hits


class _WordList:
    """The list of one language, whose words stand alone."""

    def __init__(self, words: Iterable[str]) -> None:
        self._by_run: dict[str, list[tuple[str, int, int]]] = {}
        self._without_run: list[str] = []
        for word in sorted(set(words)):
            first = _RUN.search(word)
            if first is None:
                self._without_run.append(word)
            else:
                entry = (word, first.start(), len(_RUN.findall(word)))
                self._by_run.setdefault(first[0], []).append(entry)
        self._keys = _hash_table(self._by_run)

    def share(self, text: str, *, first: bool) -> tuple[float, str]:
        """Return the share of words that are listed, and one of them; ``first`` ends the search."""
        if _SPLITS_IN_TWO in text:
            text = text.lower()
        points = code_points(text)
        starts = np.empty(len(points) // 2 + 1, dtype=np.int64)
        numbers = np.empty(len(points) // 2 + 1, dtype=np.int64)
        runs, hits = _listed(points, _table(), self._keys, starts, numbers)
        lowered = text.lower() if hits else ""
        covered: set[int] = set()
        example = ""
        for start, number in zip(starts[:hits].tolist(), numbers[:hits].tolist(), strict=True):
            for word, runs_in_word in self._words_at(lowered, start):
                example = example or word
                if first:
                    return 1 / runs, word
                covered.update(range(number, number + runs_in_word))
        if self._without_run and not lowered:
            lowered = text if text.isascii() else text.lower()  # no letters are looked for
        for word in self._without_run:
            if any(_stands_alone(lowered, start, word) for start in _places(lowered, word)):
                return max(len(covered), 1) / max(runs, 1), example or word
        return (len(covered) / runs if runs else 0.0), example

    def _words_at(self, lowered: str, start: int) -> Iterator[tuple[str, int]]:
        """Yield the words (and their runs) whose first run of word characters begins at a place."""
        run = _RUN.match(lowered, start)
        for word, offset, runs in self._by_run.get(run[0], ()) if run else ():
            if _stands_alone(lowered, start - offset, word):
                yield word, runs


class _Substrings:
    """The list of one language that sets no spaces: words count anywhere."""

    def __init__(self, words: Iterable[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, sorted(set(words), key=_longest))))

    def share(self, text: str, *, first: bool) -> tuple[float, str]:
        """Return the share of characters in listed words, and one word; ``first`` ends it."""
        lowered = text.lower()
        found = self._pattern.search(lowered)
        if found is None:
            return 0.0, ""
        matches = [found] if first else self._pattern.finditer(lowered)
        characters = sum(map(str.isalnum, lowered))
        return sum(len(match[0]) for match in matches) / max(characters, 1), found[0]


def _longest(word: str) -> tuple[int, str]:
    return -len(word), word


def _hash_table(runs: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Return an open hash table of the runs' hashes, at most half full."""
    words = list(runs)
    slots = 1 << (2 * len(words) + 1).bit_length()
    keys = np.zeros(slots, dtype=np.uint64)
    for word in words:
        key = int(_run_key(code_points(word), _table()))
        slot = key >> 1 & slots - 1
        while keys[slot] not in (0, key):
            slot = slot + 1 & slots - 1
        keys[slot] = key
    return keys


def _places(text: str, word: str) -> Iterator[int]:
    start = text.find(word)
    while start >= 0:
        yield start
        start = text.find(word, start + 1)


def _stands_alone(text: str, start: int, word: str) -> bool:
    """Whether a word stands at a place, with no word character on either side."""
    end = start + len(word)
    return (
        start >= 0
        and text.startswith(word, start)
        and (start == 0 or not _in_word(text[start - 1]))
        and (end == len(text) or not _in_word(text[end]))
    )


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


class BadWords:
    """Drops pages that hold listed words; documents in a language without a list pass."""

    name = "bad_words"

    def __init__(
        self,
        *,
        lists: tuple[tuple[str, ListFile], ...],
        language: str = "en",
        max_share: float = 0.0,
    ) -> None:
        """Load the lists.

        Raises:
            DataError: a list is empty, cannot be read or has changed since the run began.
        """
        words: dict[str, list[str]] = {}
        for name, file in lists:
            found = list(entries([file], lambda line: line.strip().lower()))
            if not found:
                raise DataError(
                    f"the list of bad words {file.path} is empty; put one word per line, or leave "
                    "it out"
                )
            words.setdefault(name, []).extend(found)
        self._lists = {
            name: (_Substrings if name in _UNSPACED else _WordList)(each)
            for name, each in words.items()
        }
        self._language = language
        self._max_share = max_share

    def __call__(self, document: Document) -> Verdict:
        """Drop the document or leave it as it is."""
        words = self._lists.get(document.language or self._language)
        if words is None:
            return Kept(document)
        share, _ = words.share(document.text, first=not self._max_share)
        return Dropped("bad_words.listed") if share > self._max_share else Kept(document)

    def findings(self, document: Document) -> list[Finding]:
        """Return the share of a document's words that are listed."""
        words = self._lists.get(document.language or self._language)
        if words is None:
            return []
        share, example = words.share(document.text, first=False)
        limit = f"at most {self._max_share:g} of the words" if self._max_share else "no listed word"
        value = f"{share:.6f} ({example})" if example else 0.0
        return [Finding("bad_words.listed", value, limit, share <= self._max_share)]


def _options(config: PipelineConfig) -> dict[str, Any] | None:
    section = config.bad_words
    if section.path is None:
        return None
    return {
        "lists": word_lists(section.path, section.language),
        "language": section.language,
        "max_share": section.max_share,
    }


def _settings(config: PipelineConfig) -> dict[str, Any]:
    options = _options(config)
    if options is None:
        return {"list": "none was given; no page was tested"}
    lists = [f"{language} {file.digest}" for language, file in options["lists"]]
    return {**options, "lists": lists}


BAD_WORDS = StepKind(build=BadWords, options=_options, settings=_settings)
"""How the step comes out of the configuration."""
