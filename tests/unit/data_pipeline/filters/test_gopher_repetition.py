"""Gopher's repetition rules in both readings, at their limits and against plain Python."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.config.rules import GopherRepetitionConfig
from data_pipeline.document import Document
from data_pipeline.filters.gopher_repetition import (
    GopherRepetition,
    fineweb_measures,
    massiveweb_measures,
)
from data_pipeline.step import Dropped, Kept
from data_pipeline.text.words import words

LIMITS = GopherRepetitionConfig()
FREE = GopherRepetitionConfig(
    max_duplicate_lines=None, max_duplicate_paragraphs=None, max_duplicate_line_characters=None,
    max_duplicate_paragraph_characters=None, max_top_ngram_characters=(),
    max_duplicate_ngram_characters=(),
)  # fmt: skip


def judge(text: str, **limits: object) -> str:
    """Return why a text goes, or an empty string; all other rules are off."""
    verdict = GopherRepetition(replace(FREE, **limits))(Document(id="0", source="s", text=text))
    return verdict.reason.partition(".")[2] if isinstance(verdict, Dropped) else ""


A, B = "fineweb", "massiveweb"
REPEATED = "one two three four five six one two three four five six"  # 55 characters, 45 in words


@pytest.mark.parametrize(
    ("reading", "text", "limits", "reason"),
    [
        # a line that stands three times: two duplicates, or three repeated of four
        (A, "a\nb\na\na", {"max_duplicate_lines": 0.5}, ""),
        (A, "a\nb\na\na", {"max_duplicate_lines": 0.49}, "duplicate_lines"),
        (B, "a\nb\na\na", {"max_duplicate_lines": 0.75}, ""),
        (B, "a\nb\na\na", {"max_duplicate_lines": 0.74}, "duplicate_lines"),
        # lines are compared as they stand, or stripped
        (A, "a\n a\n", {"max_duplicate_lines": 0.0}, ""),
        (B, "a\n a\n", {"max_duplicate_lines": 0.9}, "duplicate_lines"),
        # white space between newlines parts lines for fineweb only
        (A, "a\n \n \nb", {"max_duplicate_lines": 0.24}, "duplicate_lines"),
        (B, "a\n \n \nb", {"max_duplicate_lines": 0.0}, ""),
        # shares of the text with its newlines, or of the lines themselves
        (A, "aaaa\nb\naaaa", {"max_duplicate_line_characters": 4 / 11}, ""),
        (A, "aaaa\nb\naaaa", {"max_duplicate_line_characters": 0.36}, "duplicate_line_characters"),
        (B, "aaaa\nb\naaaa", {"max_duplicate_line_characters": 8 / 9}, ""),
        (B, "aaaa\nb\naaaa", {"max_duplicate_line_characters": 0.88}, "duplicate_line_characters"),
        # paragraphs are cut at two newlines, any number of them for fineweb
        (A, "\n\na\nb\n\n\na\nb\n", {"max_duplicate_paragraphs": 0.5}, ""),
        (A, "\n\na\nb\n\n\na\nb\n", {"max_duplicate_paragraphs": 0.4}, "duplicate_paragraphs"),
        (B, "a\nb\n\n\na\nb", {"max_duplicate_paragraphs": 0.9}, "duplicate_paragraphs"),
        (A, "aa\n\naa", {"max_duplicate_paragraph_characters": 2 / 6}, ""),
        (
            A, "aa\n\naa", {"max_duplicate_paragraph_characters": 0.33},
            "duplicate_paragraph_characters",
        ),
        # the top n-gram: "a b" three times, 9 of 14 characters with its spaces, 6 of 8 without
        (A, "a b a b x a b z", {"max_top_ngram_characters": (0.6,)}, ""),
        (A, "a b a b x a b z", {"max_top_ngram_characters": (0.59,)}, "top_2_gram"),
        (B, "a b a b x a b z", {"max_top_ngram_characters": (0.75,)}, ""),
        (B, "a b a b x a b z", {"max_top_ngram_characters": (0.74,)}, "top_2_gram"),
        # an n-gram that stands once is the top one for fineweb
        (A, "aa bb", {"max_top_ngram_characters": (0.99,)}, "top_2_gram"),
        (B, "aa bb", {"max_top_ngram_characters": (0.0,)}, ""),
        (A, "aa", {"max_top_ngram_characters": (0.0, 0.0, 0.0)}, ""),
        # of equally frequent ones the first counts, or the longest
        (A, "a b cc dd a b cc dd", {"max_top_ngram_characters": (6 / 19,)}, ""),
        (B, "a b cc dd a b cc dd", {"max_top_ngram_characters": (8 / 12,)}, ""),
        (B, "a b cc dd a b cc dd", {"max_top_ngram_characters": (0.66,)}, "top_2_gram"),
        # duplicate n-grams step over what they found, or cover both occurrences
        (A, REPEATED, {"max_duplicate_ngram_characters": (19 / 55,)}, ""),
        (A, REPEATED, {"max_duplicate_ngram_characters": (0.34,)}, "duplicate_5_grams"),
        (A, REPEATED, {"max_duplicate_ngram_characters": (1.0, 22 / 55)}, ""),
        (A, REPEATED, {"max_duplicate_ngram_characters": (1.0, 0.39)}, "duplicate_6_grams"),
        (B, REPEATED, {"max_duplicate_ngram_characters": (0.99,)}, "duplicate_5_grams"),
        (B, REPEATED, {"max_duplicate_ngram_characters": (1.0, 1.0, 0.0)}, ""),
        # fineweb runs the words of an n-gram together
        (A, "ab c d e f . a bc d e f", {"max_duplicate_ngram_characters": (0.2,)},
         "duplicate_5_grams"),
        (B, "ab c d e f . a bc d e f", {"max_duplicate_ngram_characters": (0.0,)}, ""),
        # punctuation is a word for fineweb
        (A, ". . . .", {"max_top_ngram_characters": (0.5,)}, "top_2_gram"),
        (B, "x . . . .", {"max_top_ngram_characters": (0.0,)}, ""),
        (A, "", {}, "empty"),
        (B, " \n", {}, "empty"),
        (A, " \n", {}, ""),
    ],
)  # fmt: skip
def test_every_rule_at_its_limit(
    reading: str, text: str, limits: dict[str, object], reason: str
) -> None:
    assert judge(text, reading=reading, **limits) == reason


@pytest.mark.parametrize("reading", [A, B])
def test_texts_without_repetition_pass_with_a_finding_per_rule(reading: str) -> None:
    text = "\n".join(f"line{n} speaks{n} of{n} something{n} else{n}." for n in range(30))
    document = Document(id="0", source="s", text=text)
    step = GopherRepetition(replace(LIMITS, reading=reading))
    assert step(document) == Kept(document)
    found = step.findings(document)
    assert len(found) == 14
    assert all(each.passed for each in found)
    assert {"gopher_repetition.top_4_gram", "gopher_repetition.duplicate_10_grams"} < {
        each.rule for each in found
    }


def test_a_language_has_its_own_limits() -> None:
    loose = replace(FREE, reading=B)
    step = GopherRepetition(by_language=(("de", loose),))
    text = "aa\naa\naa"
    assert isinstance(step(Document(id="0", source="s", text=text, language="de")), Kept)
    assert isinstance(step(Document(id="0", source="s", text=text)), Dropped)


def fineweb_reference(text: str) -> list[float]:
    """Measure a text as datatrove 0.10.1 does, with the words of ``words.py``."""
    values: list[float] = []
    for pieces in (re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)):
        again = [piece for k, piece in enumerate(pieces) if piece in pieces[:k]]
        values += [len(again) / len(pieces), sum(map(len, again)) / len(text)]
    split = words(text).texts()
    for n in (2, 3, 4):
        grams = Counter(" ".join(split[k : k + n]) for k in range(len(split) - n + 1))
        top = grams.most_common(1)
        values.append(len(top[0][0]) * top[0][1] / len(text) if top else 0.0)
    for n in range(5, 11):
        seen, k, repeated = set(), 0, 0
        while k + n <= len(split):
            gram = "".join(split[k : k + n])
            repeated += len(gram) * (gram in seen)
            k += n if gram in seen else 1
            seen.add(gram)
        values.append(repeated / len(text))
    return values


def massiveweb_reference(text: str) -> list[float]:
    """Measure a text as DCLM does, with the words of ``words.py``."""
    shares, by_characters = [], []
    for pieces in (text.split("\n"), text.split("\n\n")):
        kept = [piece.strip() for piece in pieces if piece.strip()]
        again = [piece for piece in kept if kept.count(piece) > 1]
        shares.append(len(again) / len(kept))
        by_characters.append(sum(map(len, again)) / len("".join(kept)))
    values = shares + by_characters
    split = [word for word in words(text).texts() if word[0].isalnum()]
    total = len("".join(split)) or 1
    for n in range(2, 11):
        grams = [tuple(split[k : k + n]) for k in range(len(split) - n + 1)]
        most = max((grams.count(gram) for gram in grams), default=0)
        if n < 5:
            longest = max((len("".join(g)) for g in grams if grams.count(g) == most), default=0)
            values.append(most * longest / total if most > 1 else 0.0)
        else:
            covered = {k + i for k, g in enumerate(grams) if grams.count(g) > 1 for i in range(n)}
            values.append(sum(len(split[k]) for k in covered) / total)
    return values


TEXTS = st.one_of(
    st.lists(st.sampled_from(["a", "b", "ab", ".", "a b", "\n", "\n\n", " "]), max_size=60).map(
        " ".join
    ),
    st.lists(st.sampled_from("ab \n.é日"), max_size=60).map("".join),
)


@given(TEXTS.filter(bool))
@example(" ".join(["x"] * 300))
@example(" ".join(str(n % 37) for n in range(600)))
def test_fineweb_measures_equal_plain_python(text: str) -> None:
    measured = [each.value for each in fineweb_measures(text, LIMITS)]
    assert measured[1:] == fineweb_reference(text)


@given(TEXTS.filter(str.strip))
@example(" ".join(["x"] * 300))
@example(" ".join(str(n % 37) for n in range(200)))
def test_massiveweb_measures_equal_plain_python(text: str) -> None:
    measured = [each.value for each in massiveweb_measures(text, LIMITS)]
    assert measured[1:] == pytest.approx(massiveweb_reference(text), abs=1e-15)
