"""C4's rules for pages and lines, in C4's order (arXiv:1910.10683; TensorFlow Datasets c4 3.0.1).

Order is part of the rules: what ends a page is looked for only in lines that passed the tests
before it. Every edit comes with runs: text[final_start:][:length] of the result equals
[extracted_start:][:length] of the input, and input = output + deleted - inserted, in characters.

    C4Lines(C4_VARIANTS["c4"])(document)  # Kept(...) or Dropped("c4.few_sentences")
"""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_pipeline.document import Document, Run, compose
from data_pipeline.sentences import SENTENCES
from data_pipeline.step import Dropped, Kept, Verdict
from llmtrain.errors import DataError

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_END_MARKS = (".", "?", "!", '"')
_POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_PAGE_KILLERS = frozenset({"c4.lorem_ipsum", "c4.curly_bracket"})
_UNSPACED = frozenset({"ja", "th", "zh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class C4Options:
    """Where the descendants of C4 differ; the defaults are C4's."""

    max_word_characters: int = 1000
    """A line with a longer word is dropped."""
    min_words: int = 5
    """A line with fewer words (white space between them) is dropped; at least 1."""
    min_sentences: int = 3
    """A page with fewer sentences in its remaining lines is dropped."""
    end_mark: bool = True
    """Whether a line must end with a full stop, question or exclamation mark or double quote."""
    sentences: Literal["punkt", "rules"] = "punkt"
    """How sentences are counted."""


C4_VARIANTS: Mapping[str, C4Options] = {
    "c4": C4Options(),
    "c4_fast": C4Options(sentences="rules"),
    "datatrove": C4Options(min_words=3, min_sentences=5),
    "dolma": C4Options(min_words=3),
    "fineweb": C4Options(min_words=3, min_sentences=5, end_mark=False),
}
"""``c4`` as published; the others with the defaults of the tool they are named for."""


@dataclass(slots=True)
class LineEdit:
    """A text under construction from stretches of another."""

    text: str = ""
    """The text after the edit."""
    runs: list[Run] = field(default_factory=list)
    """Map from the text after the edit to the one before."""
    deleted: dict[str, int] = field(default_factory=dict)
    """Characters deleted, per rule."""
    inserted: int = 0
    """Characters inserted: newlines that stand for another line separator."""

    def delete(self, rule: str, characters: int) -> None:
        """Account for deleted characters."""
        if characters:
            self.deleted[rule] = self.deleted.get(rule, 0) + characters

    def keep(self, position: int, start: int, end: int) -> int:
        """Add input[start:end] at ``position`` of the result; return the position after it."""
        length = end - start
        if self.runs:
            last = self.runs[-1]
            if (
                last.final_start + last.length == position
                and last.extracted_start + last.length == start
            ):
                self.runs[-1] = Run(last.final_start, last.extracted_start, last.length + length)
                return position + length
        if length:
            self.runs.append(Run(position, start, length))
        return position + length


def _line_rule(line: str, options: C4Options) -> str | None:
    """Return the rule that a stripped line without citations breaks, in C4's order."""
    if options.end_mark and (not line.endswith(_END_MARKS) or line.endswith("...")):
        return "c4.no_end_mark"
    if len(line.split(None, options.min_words)) < options.min_words:
        return "c4.few_words"
    lowered = line.lower()
    if "lorem ipsum" in lowered:
        return "c4.lorem_ipsum"
    if "javascript" in lowered:
        return "c4.javascript"
    if "{" in line:
        return "c4.curly_bracket"
    if any(phrase in lowered for phrase in _POLICY):
        return "c4.policy"
    return None


def _has_long_word(line: str, limit: int) -> bool:
    """Whether a run of characters without white space is longer than ``limit``."""
    return len(line) > limit and any(len(word) > limit for word in line.split())


def clean_lines(text: str, options: C4Options) -> LineEdit | Dropped:
    """Apply the line rules to a text; a page killer or too few sentences drop the page."""
    edit = LineEdit()
    lines: list[str] = []
    position = offset = 0
    newline: int | None = None  # where the newline after the last kept line stands in the input
    for raw in text.splitlines(keepends=True):
        start, offset = offset, offset + len(raw)
        stripped = raw.strip()
        if _has_long_word(stripped, options.max_word_characters):
            edit.delete("c4.long_word", len(raw))
            continue
        line = _CITATION.sub("", stripped) if "[" in stripped else stripped
        rule = _line_rule(line, options)
        if rule is not None:
            if rule in _PAGE_KILLERS:
                return Dropped(rule)
            edit.delete(rule, len(raw))
            continue
        if lines:
            position = _join(edit, position, newline)
        start += len(raw) - len(raw.lstrip())
        position = _keep_line(edit, position, start, stripped, line)
        edit.delete("c4.whitespace", len(raw) - len(stripped))
        lines.append(line)
        newline = offset - 1 if raw.endswith("\n") else None
    if not _enough_in_lines(lines, options):
        return Dropped("c4.few_sentences")
    edit.text = "\n".join(lines)
    return _stripped(edit)


def _join(edit: LineEdit, position: int, newline: int | None) -> int:
    """Put a newline between two kept lines: the one that followed the first, or a new one."""
    if newline is None:
        edit.inserted += 1
        return position + 1
    edit.deleted["c4.whitespace"] -= 1
    return edit.keep(position, newline, newline + 1)


def _keep_line(edit: LineEdit, position: int, start: int, stripped: str, line: str) -> int:
    """Keep a stripped line that begins at ``start`` of the input, less its citations."""
    if len(line) == len(stripped):
        return edit.keep(position, start, start + len(line))
    done = 0
    for match in _CITATION.finditer(stripped):
        position = edit.keep(position, start + done, start + match.start())
        done = match.end()
    edit.delete("c4.citation", len(stripped) - len(line))
    return edit.keep(position, start + done, start + len(stripped))


def _stripped(edit: LineEdit) -> LineEdit:
    """Strip the page: a citation at its start or end may have left white space there."""
    text = edit.text.strip()
    if len(text) != len(edit.text):
        lead = len(edit.text) - len(edit.text.lstrip())
        edit.delete("c4.whitespace", len(edit.text) - len(text))
        edit.runs = list(compose([Run(0, lead, len(text))] if text else [], edit.runs))
        edit.text = text
    edit.deleted = {rule: count for rule, count in edit.deleted.items() if count}
    return edit


def _enough_in_lines(lines: Sequence[str], options: C4Options) -> bool:
    """Whether the lines hold enough sentences in all; a line holds at least one."""
    missing = options.min_sentences
    if len(lines) >= missing:
        return True
    count = SENTENCES[options.sentences]
    for line in lines:
        missing -= count(line, missing)
        if missing <= 0:
            return True
    return missing <= 0


def enough_sentences(text: str, sentences: str = "punkt", minimum: int = 3) -> bool:
    """Whether a whole text has the sentences a page needs; C4 asks again after line deduplication.

    Lines without a full stop run on into the next, so a text may have fewer than its lines.
    """
    return minimum <= 0 or SENTENCES[sentences](text, minimum) >= minimum


@dataclass(frozen=True, slots=True)
class C4Lines:
    """Keeps the lines that read like prose and the pages that have enough of them."""

    options: C4Options = C4_VARIANTS["c4"]
    """Which thresholds apply."""
    name: str = "c4_lines"
    """Name in manifests and in the funnel."""

    def __call__(self, document: Document) -> Verdict:
        """Keep the document with fewer lines, or drop it."""
        edit = clean_lines(document.text, self.options)
        if isinstance(edit, Dropped):
            return edit
        return Kept(document.edited(edit.text, edit.runs), edit.deleted, edit.inserted)


def line_key(line: str) -> bytes:
    """Return the key under which two lines are one: md5 of the line, stripped and lower-cased."""
    normalized = line.strip().lower().encode("utf-8")
    return hashlib.md5(normalized, usedforsecurity=False).digest()


@functools.lru_cache(maxsize=32)
def _bad_words_pattern(words: tuple[str, ...], language: str) -> re.Pattern[str]:
    """Compile a list: words on their own, or anywhere in scripts that set no spaces."""
    alternatives = "|".join(re.escape(word) for word in words)
    if language in _UNSPACED:
        return re.compile(alternatives)
    return re.compile(rf"(?:\W|^)({alternatives})(?:\W|$)")


def read_bad_words(path: Path) -> tuple[str, ...]:
    """Read a list with one word or phrase per line; empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the list of bad words {path} cannot be read ({error}); expected a UTF-8 text file "
            "with one word per line: give another path, or leave the list out"
        ) from error
    words = tuple(word for line in lines if (word := line.strip().lower()))
    if not words:
        raise DataError(
            f"the list of bad words {path} is empty; put one word per line, or leave it out"
        )
    return words


@dataclass(frozen=True, slots=True)
class BadWords:
    """Drops pages that hold a word of the user's list; documents in another language pass."""

    words: tuple[str, ...]
    """Lower-cased words and phrases."""
    language: str = "en"
    """Language of the list; a document whose language is not known is tested too."""
    name: str = "bad_words"
    """Name in manifests and in the funnel."""

    def __call__(self, document: Document) -> Verdict:
        """Drop the document or leave it as it is."""
        if document.language in ("", self.language) and _bad_words_pattern(
            self.words, self.language
        ).search(document.text.lower()):
            return Dropped("c4.bad_words")
        return Kept(document)
