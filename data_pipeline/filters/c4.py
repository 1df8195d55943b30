"""C4's rules for pages and lines, in C4's order (arXiv:1910.10683; TensorFlow Datasets c4 3.0.1).

Order is part of the rules: what ends a page is looked for only in lines that passed the tests
before it. Every edit comes with runs: text[final_start:][:length] of the result equals
[extracted_start:][:length] of the input, and input = output + deleted - inserted, in characters.

    C4Lines(C4_VARIANTS["c4"])(document)  # Kept(...) or Dropped("c4.few_sentences")
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document, Run, compose
from data_pipeline.filters.c4_lines import RULES, LineRules, Lines, walk
from data_pipeline.filters.long_lines import LongLines
from data_pipeline.step import Dropped, Finding, Kept, Step, StepKind, Verdict
from data_pipeline.text.sentences import SENTENCES

_REASONS = tuple(f"c4.{rule}" for rule in RULES)
_KILLERS = ("c4.lorem_ipsum", "c4.curly_bracket")


@dataclass(frozen=True, slots=True, kw_only=True)
class C4Options:
    """Where the descendants of C4 differ; the defaults are C4's."""

    max_word_characters: int = 1000
    """A line with a longer word is dropped."""
    min_words: int = 5
    """A line with fewer words (white space between them) is dropped; at least 1."""
    min_sentences: int = 3
    """A page with fewer sentences in its remaining lines is dropped."""
    end_marks: str = '.?!"'
    """A line must end with one of these characters, and not with three full stops; empty accepts
    any end."""
    cited_words: bool = False
    """Whether words are counted before citations are deleted, and not after."""
    sentences: Literal["punkt", "rules"] = "punkt"
    """How sentences are counted."""


C4_VARIANTS: Mapping[str, C4Options] = {
    "c4": C4Options(),
    "c4_fast": C4Options(sentences="rules"),
    "datatrove": C4Options(
        min_words=3, min_sentences=5, end_marks=".?!\"'", cited_words=True, sentences="rules"
    ),
    "dolma": C4Options(min_words=3),
    "fineweb": C4Options(
        min_words=3, min_sentences=5, end_marks="", cited_words=True, sentences="rules"
    ),
    "mc4": C4Options(min_sentences=0),
}
"""``c4`` as published; the others with the defaults of the tool they are named for. ``mc4`` judges
pages by ``LongLines``, and counts no sentences after line deduplication, as in tfds: full stops
differ by script.
"""


@dataclass(slots=True)
class LineEdit:
    """A text and how it came out of another."""

    text: str = ""
    """The text after the edit."""
    runs: list[Run] = field(default_factory=list)
    """Map from the text after the edit to the one before."""
    deleted: dict[str, int] = field(default_factory=dict)
    """Characters deleted, per rule."""
    inserted: int = 0
    """Characters inserted: newlines that stand for another line separator."""


def clean_lines(text: str, options: C4Options) -> LineEdit | Dropped:
    """Apply the line rules to a text; a page killer or too few sentences drop the page."""
    lines = walk(text, _line_rules(options))
    for count, reason in zip(lines.killers, _KILLERS, strict=True):
        if count:
            return Dropped(reason)
    left = _assemble(text, lines)
    if lines.kept < options.min_sentences and not _enough_in_lines(left, lines.kept, options):
        return Dropped("c4.few_sentences")
    deleted = dict(zip(_REASONS, lines.deleted, strict=False))
    return _stripped(LineEdit(left, lines.runs, deleted, lines.inserted))


@functools.cache
def _line_rules(options: C4Options) -> LineRules:
    marks = np.array([ord(mark) for mark in options.end_marks], dtype=np.uint32)
    return LineRules(options.max_word_characters, options.min_words, marks, options.cited_words)


def _assemble(text: str, lines: Lines) -> str:
    """Put together what stays of a text; what lies between two runs is a newline."""
    parts = []
    end = 0
    for final, start, length in lines.runs:
        if final > end:
            parts.append("\n" * (final - end))
        parts.append(text[start : start + length])
        end = final + length
    return "".join(parts)


def _stripped(edit: LineEdit) -> LineEdit:
    """Strip the page: a citation at its start or end may have left white space there."""
    text = edit.text.strip()
    if len(text) != len(edit.text):
        lead = len(edit.text) - len(edit.text.lstrip())
        edit.deleted["c4.whitespace"] += len(edit.text) - len(text)
        edit.runs = list(compose([Run(0, lead, len(text))] if text else [], edit.runs))
        edit.text = text
    edit.deleted = {rule: count for rule, count in edit.deleted.items() if count}
    return edit


def _count_in_lines(lines: Sequence[str], options: C4Options, limit: int) -> int:
    """Count the sentences of lines one by one, up to ``limit``; a kept line has at least one."""
    count = SENTENCES[options.sentences]
    total = 0
    for line in lines:
        total += max(1, count(line, limit - total))
        if total >= limit:
            break
    return total


def _enough_in_lines(text: str, kept: int, options: C4Options) -> bool:
    """Whether the lines hold enough sentences in all.

    A sentence that is not a line's last ends with a mark of its own, so most pages with too few
    are known without a splitter.
    """
    lines = text.split("\n") if kept else []
    most = sum(1 + sum(line.count(mark, 0, len(line) - 1) for mark in ".?!") for line in lines)
    if most < options.min_sentences:
        return False
    return _count_in_lines(lines, options, options.min_sentences) >= options.min_sentences


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
    name: str = "c4"
    """Name in manifests and in the funnel."""

    def __call__(self, document: Document) -> Verdict:
        """Keep the document with fewer lines, or drop it."""
        edit = clean_lines(document.text, self.options)
        if isinstance(edit, Dropped):
            return edit
        return Kept(document.edited(edit.text, edit.runs), edit.deleted, edit.inserted)

    def findings(self, document: Document) -> list[Finding]:
        """Return what drops the page, then the characters of lines that only they drop."""
        text, options = document.text, self.options
        lines = walk(text, _line_rules(options), every=True)
        found = [
            Finding(reason, count, "no line", not count)
            for count, reason in zip(lines.killers, _KILLERS, strict=True)
        ]
        left = _assemble(text, lines).split("\n") if lines.kept else []
        sentences = _count_in_lines(left, options, len(text) + 1)
        enough = sentences >= options.min_sentences
        found.append(
            Finding("c4.few_sentences", sentences, f"at least {options.min_sentences}", enough)
        )
        return found + [
            Finding(f"c4.{rule}", characters, "deleted, the page stays", True)
            for rule, characters in zip(RULES, lines.deleted, strict=False)
        ]


def _build(variant: str) -> Step:
    return LongLines() if variant == "mc4" else C4Lines(C4_VARIANTS[variant])


def _settings(config: PipelineConfig) -> dict[str, Any]:
    return {"variant": config.c4.variant, **asdict(C4_VARIANTS[config.c4.variant])}


C4 = StepKind(
    build=_build, options=lambda config: {"variant": config.c4.variant}, settings=_settings
)
"""How the stage comes out of the configuration."""


def line_key(line: str) -> bytes:
    """Return the key under which two lines are one: md5 of the line, stripped and lower-cased."""
    normalized = line.strip().lower().encode("utf-8")
    return hashlib.md5(normalized, usedforsecurity=False).digest()
