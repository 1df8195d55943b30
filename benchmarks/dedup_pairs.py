"""Labelled pairs of documents: changed copies, boilerplate, translations.

Bases are pages of the corpus without natural duplicates: no other page shares a band with them
under the widest of the presets. A changed copy has a share of its words replaced by words of other
pages of its language. In Chinese and Japanese, where words are not marked, two characters in a row
are a word: about the length of one, and no side's own idea of it.

    corpus = read_pages(Path("/data/corpus"), limit=400)
    pairs = make_pairs(corpus, number=3000, seed=0)
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding

from data_pipeline.dedup.minhash import MinHasher

SOURCES = {
    "libreoffice-help-de": "deu", "libreoffice-help-es": "spa", "libreoffice-help-fr": "fra",
    "libreoffice-help-ru": "rus", "libreoffice-help-ja": "jpn_Jpan",
    "libreoffice-help-zh-cn": "zho_Hani", "gimp-help-en": "eng", "linux-doc-6.1": "eng",
    "python3.11-doc": "eng", "postgresql-doc-15": "eng", "git-doc": "eng",
    "python-django-doc": "eng", "debian-handbook": "",
}  # fmt: skip
"""Package -> language of its pages, in datatrove's spelling; none: only one of several is taken."""
HANDBOOK = {"en-US": "eng", "de-DE": "deu", "zh-CN": "zho_Hani", "ja-JP": "jpn_Jpan"}
RATES = (1, 2, 3, 4, 5, 6, 8)
"""Per cent of the words that are changed."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]{1,2}|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+")
_SMALLEST, _LARGEST = 80, 4000
"""Words of a page that is taken."""
_BOILERPLATE_WORDS = 15
"""Words put before and after a page; two pages of a language have the same, no third one has.

Pairs that share their few inserted shingles would share the luck of the hash as well: one draw."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a manual."""

    text: str
    language: str
    name: str
    """Path of the page, without its language: equal for translations of one page."""


@dataclass(slots=True)
class Pairs:
    """Documents, and which two of them make a pair of which kind."""

    texts: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def add(self, text: str, language: str) -> int:
        """Add a document; return its number."""
        self.texts.append(text)
        self.languages.append(language)
        return len(self.texts) - 1


def read_pages(corpus: Path, limit: int) -> list[Page]:
    """Return up to ``limit`` pages of every source, those with text of a useful length."""
    pages = []
    for package, language in SOURCES.items():
        found = 0
        for name, text in _texts(sorted((corpus / "warc").glob(f"{package}-0*.warc.gz"))):
            locale = _locale(name)
            spoken = language or HANDBOOK.get(locale, "")
            words = len(_WORD.findall(text)) if spoken else 0
            if not _SMALLEST <= words <= _LARGEST:
                continue
            shared = re.sub(r"libreoffice-help-[\w-]+?/", "", name.replace(f"/{locale}/", "/"))
            pages.append(Page(text, spoken, shared))
            found += 1
            if found == limit:
                break
    return pages


def _locale(address: str) -> str:
    match = re.search(r"/(?:html|help)/([A-Za-z]{2}(?:-[A-Za-z]{2,4})?)/", address)
    return match[1] if match else ""


def _texts(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield (address, main text) of the pages of WARC files."""
    for file in files:
        with file.open("rb") as stream:
            for record in ArchiveIterator(stream, record_types=WarcRecordType.response):
                body = record.reader.read()
                html = body.decode(detect_encoding(body) or "utf-8", "replace")
                address = record.headers["WARC-Target-URI"]
                yield address, str(extract_plain_text(html, main_content=True))


def without_duplicates(pages: list[Page]) -> list[Page]:
    """Return the pages that share no band with any other."""
    keys = np.concatenate([
        MinHasher(preset).band_keys([page.text for page in pages])
        for preset in ("fineweb", "olmo")
    ], axis=1)  # fmt: skip
    counts = Counter(key for row in keys.tolist() for key in set(row))
    return [
        page for page, row in zip(pages, keys.tolist(), strict=True)
        if all(counts[key] == 1 for key in row)
    ]  # fmt: skip


def changed(text: str, share: float, vocabulary: list[str], rng: random.Random) -> str:
    """Return the text with a share of its words replaced, at least one."""
    words = list(_WORD.finditer(text))
    places = rng.sample(range(len(words)), max(1, round(share * len(words))))
    parts, position = [], 0
    for place in sorted(places):
        parts += [text[position : words[place].start()], rng.choice(vocabulary)]
        position = words[place].end()
    return "".join([*parts, text[position:]])


def make_pairs(pages: list[Page], number: int, seed: int) -> Pairs:
    """Return ``number`` pairs of every kind, fewer translations where there are not as many."""
    rng = random.Random(seed)
    bases = without_duplicates(pages)
    vocabulary: dict[str, list[str]] = {}
    for page in bases:
        vocabulary.setdefault(page.language, []).extend(_WORD.findall(page.text))
    result = Pairs()
    at = [result.add(page.text, page.language) for page in bases]
    for rate in RATES:
        for base in _draw(rng, len(bases), number):
            page = bases[base]
            copy = changed(page.text, rate / 100, vocabulary[page.language], rng)
            pair = (at[base], result.add(copy, page.language))
            result.pairs.setdefault(f"changed {rate} %", []).append(pair)
    _add_framed(result, at, _draw(rng, len(bases), number), vocabulary, rng)
    result.pairs["translations"] = _translations(bases, at, rng)[:number]
    return result


def _add_framed(
    result: Pairs, at: list[int], drawn: list[int], vocabulary: dict[str, list[str]],
    rng: random.Random,
) -> None:  # fmt: skip
    """Add copies with boilerplate around them, and the pairs that they make."""
    frames: dict[str, tuple[str, str]] = {}
    framed: dict[str, list[int]] = {}
    for base in (at[number] for number in drawn):
        text, language = result.texts[base], result.languages[base]
        copies, words = framed.setdefault(language, []), vocabulary[language]
        if len(copies) % 2 == 0:
            frames[language] = (_phrase(rng, words), _phrase(rng, words))
        head, foot = frames[language]
        copies.append(result.add(f"{head}\n{text}\n{foot}", language))
        result.pairs.setdefault("boilerplate", []).append((base, copies[-1]))
    result.pairs["same boilerplate"] = [
        pair for copies in framed.values() for pair in zip(copies[::2], copies[1::2], strict=False)
        if result.texts[pair[0]] != result.texts[pair[1]]
    ]  # fmt: skip


def _draw(rng: random.Random, size: int, number: int) -> list[int]:
    """Draw bases, each once as long as there are enough."""
    if number <= size:
        return rng.sample(range(size), number)
    return [*rng.sample(range(size), size), *rng.choices(range(size), k=number - size)]


def _phrase(rng: random.Random, words: list[str]) -> str:
    return " ".join(rng.choices(words, k=_BOILERPLATE_WORDS)) + "."


def _translations(bases: list[Page], at: list[int], rng: random.Random) -> list[tuple[int, int]]:
    """Return pairs of pages in two languages, Chinese with Japanese among them."""
    versions: dict[str, list[int]] = {}
    for number, page in enumerate(bases):
        versions.setdefault(page.name, []).append(number)
    pairs = [
        (at[one], at[other])
        for numbers in versions.values()
        for i, one in enumerate(numbers)
        for other in numbers[:i]
        if bases[one].language != bases[other].language
    ]
    rng.shuffle(pairs)
    return pairs
