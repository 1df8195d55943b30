"""datatrove's filters, its splitters or ours, and its decisions on single documents.

``splitter=shipped`` leaves datatrove's defaults (spaCy); ``splitter=ours`` gives every filter and
MinHash the words and the sentences of data_pipeline/text through the ``language`` argument, which
takes a tokenizer object as well as a language.

    make_filter("c4", "ours", "punkt").filter(Document(text="...", id="1"))
"""

import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.readers import JsonlReader, ParquetReader
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.word_tokenizers import WordTokenizer

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for data_pipeline


class OurSplitter(WordTokenizer):
    """The project's words and sentences behind datatrove's interface."""

    def __init__(self, sentences: str) -> None:
        super().__init__()
        import punkt

        from data_pipeline.text.sentences import SENTENCES
        from data_pipeline.text.words import words

        self._words = words
        self._punkt = punkt.tokenizer_for("english") if sentences == "punkt" else None
        self._count = SENTENCES[sentences]

    def word_tokenize(self, text: str) -> list[str]:
        return self._words(text).texts()

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return the spans, of which C4 takes the number only."""
        if self._punkt is not None:
            return list(self._punkt.span_tokenize(text))
        return [(0, len(text))] * self._count(text, len(text))


@cache
def language(splitter: str, sentences: str = "punkt") -> WordTokenizer | str:
    """Return what filters take as their language."""
    return "eng" if splitter == "shipped" else OurSplitter(sentences)


FILTERS: dict[str, tuple[type[BaseFilter], dict[str, Any]]] = {
    "c4": (C4QualityFilter, {}),
    "c4_published": (C4QualityFilter, {"min_num_sentences": 3, "min_words_per_line": 5}),
    "c4_fineweb": (C4QualityFilter, {"filter_no_terminal_punct": False}),
    "gopher_quality": (GopherQualityFilter, {}),
    "gopher_repetition": (GopherRepetitionFilter, {}),
    "fineweb": (FineWebQualityFilter, {}),
}
"""Name in requests -> filter, and what differs from datatrove's defaults."""


def make_filter(
    name: str, splitter: str, sentences: str, writer: DiskWriter | None = None, **limits: Any
) -> BaseFilter:
    """Make one filter with datatrove's own limits, some of them replaced."""
    kind, options = FILTERS[name]
    common = {"language": language(splitter, sentences), "exclusion_writer": writer}
    return kind(**{**options, **common, **limits})


NEVER = float("inf")
ALONE_IN: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "c4": (
        {"filter_lorem_ipsum": False, "filter_curly_bracket": False, "min_num_sentences": -1},
        {
            "lorem_ipsum": {"filter_lorem_ipsum": True},
            "curly_bracket": {"filter_curly_bracket": True},
            "few_sentences": {"min_num_sentences": 5},
        },
    ),
    "gopher_quality": (
        {
            "min_doc_words": None, "max_doc_words": None, "min_avg_word_length": None,
            "max_avg_word_length": None, "max_symbol_word_ratio": None,
            "max_bullet_lines_ratio": None, "max_ellipsis_lines_ratio": None,
            "max_non_alpha_words_ratio": None, "min_stop_words": None,
        },
        {
            "few_words": {"min_doc_words": 50},
            "many_words": {"max_doc_words": 100_000},
            "short_words": {"min_avg_word_length": 3},
            "long_words": {"max_avg_word_length": 10},
            "hashes or ellipses": {"max_symbol_word_ratio": 0.1},
            "bullet_lines": {"max_bullet_lines_ratio": 0.9},
            "ellipsis_lines": {"max_ellipsis_lines_ratio": 0.3},
            "few_letters": {"max_non_alpha_words_ratio": 0.8},
            "few_stop_words": {"min_stop_words": 2},
        },
    ),
    "gopher_repetition": (
        {
            "dup_line_frac": None, "dup_para_frac": None, "dup_line_char_frac": None,
            "dup_para_char_frac": None, "top_n_grams": (), "dup_n_grams": (),
        },
        {
            "duplicate_paragraphs": {"dup_para_frac": 0.3},
            "duplicate_paragraph_characters": {"dup_para_char_frac": 0.2},
            "duplicate_lines": {"dup_line_frac": 0.3},
            "duplicate_line_characters": {"dup_line_char_frac": 0.2},
            **{
                f"top_{n}_gram": {"top_n_grams": ((n, most),)}
                for n, most in ((2, 0.2), (3, 0.18), (4, 0.16))
            },
            **{
                f"duplicate_{n}_grams": {"dup_n_grams": ((n, most),)}
                for n, most in zip(range(5, 11), (0.15, 0.14, 0.13, 0.12, 0.11, 0.1), strict=True)
            },
        },
    ),
    "fineweb": (
        {
            "line_punct_thr": 0.0, "short_line_thr": NEVER, "char_duplicates_ratio": NEVER,
            "new_line_ratio": NEVER,
        },
        {
            "few_end_marks": {"line_punct_thr": 0.12},
            "short_lines": {"short_line_thr": 0.67},
            "duplicate_lines": {"char_duplicates_ratio": 0.01},
            "newlines": {"new_line_ratio": 0.3},
        },
    ),
}  # fmt: skip
"""Filter -> limits that drop nothing, and every rule (in our names) with its limit of datatrove."""


def reader(path: str) -> PipelineStep:
    """Read one Parquet or JSONL file as a task."""
    file = Path(path)
    kind = ParquetReader if file.suffix == ".parquet" else JsonlReader
    return kind(str(file.parent), glob_pattern=file.name)


def decide(input: str, out: str, names: list[str], splitter: str, sentences: str) -> dict[str, int]:
    """Write what every filter and each of its rules alone say of every document as it came."""
    made = {
        name: {
            "": make_filter(name, splitter, sentences),
            **{
                rule: make_filter(name, splitter, sentences, **{**ALONE_IN[name][0], **limits})
                for rule, limits in ALONE_IN[name][1].items()
            },
        }
        for name in names
    }
    documents = 0
    with Path(out).open("w", encoding="utf-8") as file:
        for document in reader(input).run(None, 0, 1):
            documents += 1
            for name, rules in made.items():
                kept, reason, text = judge(document, rules[""])
                failed = [rule for rule in rules if rule and not judge(document, rules[rule])[0]]
                line = {
                    "id": document.id, "filter": name, "kept": kept, "reason": reason,
                    "text": hashlib.sha256(text.encode()).hexdigest() if kept else "",
                    "failed": failed,
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
    return {"documents": documents}


def judge(document: Document, step: BaseFilter) -> tuple[bool, str, str]:
    """Return whether a filter keeps a document, why not, and the text it leaves."""
    copy = Document(text=document.text, id=document.id)
    try:
        kept, reason = get_filter_result(step.filter(copy))
    except ZeroDivisionError:  # a text without words or lines, which datatrove does not expect
        return False, "ZeroDivisionError", ""
    return bool(kept), reason or "", copy.text
