"""The splitter against fifteen lines of Python, and the table of characters against ``str``."""

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.text.characters import LONE_RANGES
from data_pipeline.text.code_points import (
    ALPHABETIC,
    ALPHANUMERIC,
    BLANK,
    DIGIT,
    END_MARK,
    LINE_BREAK,
    SYMBOL,
    code_points,
    properties,
)
from data_pipeline.text.words import (
    HAS_CONTENT,
    HAS_LETTER,
    Splitter,
    hash_points,
    words,
)


def kind(character: str) -> str:
    """Return the class of a character, from the definition in ``words.py``."""
    category = unicodedata.category(character)
    if character.isspace() or category[0] == "Z" or character in "\u200b\ufeff":
        return "space"
    if category[0] == "M" or category == "Cf":
        return "mark"
    if category[0] in "LN" or category == "Pc":
        return "lone" if any(a <= ord(character) < b for a, b in LONE_RANGES) else "letter"
    return "joiner" if character in "'’.·" else "other"


def reference(text: str) -> list[str]:
    """Split a text as the definition says."""
    found, i = [], 0
    while i < len(text):
        first, j = kind(text[i]), i + 1
        if first in ("letter", "mark"):
            while j < len(text) and (kind(text[j]) in ("letter", "mark") or joined(text, j)):
                j += 1
        elif first != "space":
            while first != "lone" and text[j : j + 1] == text[i]:
                j += 1
            while j < len(text) and kind(text[j]) == "mark":
                j += 1
        if first != "space":
            found.append(text[i:j])
        i = j
    return found


def joined(text: str, j: int) -> bool:
    after = text[j + 1 : j + 2]
    if text[j] == ",":
        return text[j - 1].isdecimal() and after.isdecimal()
    return kind(text[j]) == "joiner" and after != "" and kind(after) == "letter"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t\u200b ", []),
        (
            "Don't panic -- it's 3,000.5%...",
            ["Don't", "panic", "--", "it's", "3,000.5", "%", "..."],
        ),
        ("a,b 1,2 1, 2 ,3", ["a", ",", "b", "1,2", "1", ",", "2", ",", "3"]),
        ("U.S. foo_bar state-of", ["U.S", ".", "foo_bar", "state", "-", "of"]),
        ("l’eau d' 'quoted'", ["l’eau", "d", "'", "'", "quoted", "'"]),
        ("e\u0301te\u0301 na\u00efve", ["e\u0301te\u0301", "na\u00efve"]),
        ("日本語のヽ々", ["日", "本", "語", "の", "ヽ", "々"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("ที่ x", ["ที่", "x"]),
        ("❤\ufe0f❤\ufe0f!?!!", ["❤\ufe0f", "❤\ufe0f", "!", "?", "!!"]),
        ("\u00ads\u00adoft", ["\u00ads\u00adoft"]),
        ("x" * 5000, ["x" * 5000]),
    ],
)
def test_words_as_the_definition_says(text: str, expected: list[str]) -> None:
    assert words(text).texts() == expected == reference(text)


CHARACTERS = st.one_of(
    st.sampled_from("ab1२,.'’·-_ \n\t\u0301\u200b\u200d日のไ่한!…%٣\ud800😀"), st.characters()
)


@given(st.text(CHARACTERS, max_size=60))
@example("1,\u0661")
@example("a.")
@example("a,1")
def test_words_equal_those_of_the_reference(text: str) -> None:
    split = words(text)
    expected = reference(text)
    assert split.texts() == expected
    assert split.flags.tolist() == [
        HAS_LETTER * any(map(str.isalpha, word))
        + HAS_CONTENT * any(not properties()[ord(c)] & SYMBOL for c in word)
        for word in expected
    ]


@given(st.lists(st.text("ab.,", max_size=4), max_size=8))
def test_words_are_equal_exactly_where_their_polynomials_are(parts: list[str]) -> None:
    split = words(" ".join(parts))
    texts, sums = split.texts(), split.sums.tolist()
    assert len(set(texts)) == len(set(sums)) == len(set(zip(texts, sums, strict=True)))


@given(st.sets(st.text("ab", max_size=12), max_size=40))
def test_stretches_of_text_have_hashes_of_their_own(texts: set[str]) -> None:
    hashes = {int(hash_points(code_points(text), 0, len(text))) for text in texts}
    assert len(hashes) == len(texts)


def test_properties_are_those_of_str() -> None:
    table = properties()
    assert table.shape == (0x110000,)
    tests = {
        ALPHABETIC: str.isalpha, ALPHANUMERIC: str.isalnum, DIGIT: str.isdecimal,
        BLANK: str.isspace, LINE_BREAK: lambda c: len(f"{c}b".splitlines()) == 2,
    }  # fmt: skip
    points = [*range(0x33000), *range(0x33000, 0x110000, 61)]
    everything = [chr(point) for point in points]
    for bit, method in tests.items():
        expected = np.fromiter(map(method, everything), dtype=bool, count=len(points))
        assert np.array_equal((table[points] & bit) != 0, expected)


def test_end_marks_are_symbols_of_many_scripts() -> None:
    table = properties()
    marks = [chr(point) for point in np.flatnonzero(table & END_MARK)]
    assert len(marks) == 159
    assert set(".!?。؟।։") < set(marks)
    assert not set(",;:'\"…") & set(marks)
    assert all(table[ord(mark)] & SYMBOL for mark in marks)
    symbols = [chr(point) for point in np.flatnonzero(table & SYMBOL)]
    assert set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\x00\x9f„１") < set(symbols)
    assert not set("a1é日 \n\t€") & set(symbols)


def test_words_of_the_last_texts_are_kept_within_a_budget() -> None:
    splitter = Splitter(characters=10)
    first = splitter("one two")
    assert splitter("one two") is first
    splitter("xyz")
    assert splitter("one two") is first
    splitter("abc")
    again = splitter("one two")
    assert again is not first
    assert again.texts() == first.texts()
    assert splitter("longer than all of it").texts()[-1] == "it"
    assert splitter("longer than all of it") is not splitter("longer than all of it")
