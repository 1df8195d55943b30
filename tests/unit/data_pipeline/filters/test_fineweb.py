"""FineWeb's rules at their limits, and their counts against plain Python."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config.rules import FineWebConfig
from data_pipeline.document import Document
from data_pipeline.filters.fineweb import FineWeb, measures
from data_pipeline.step import Dropped, Kept
from data_pipeline.text.code_points import END_MARK, properties
from data_pipeline.text.words import words

LIMITS = FineWebConfig()
FREE = FineWebConfig(
    min_end_mark_lines=0.0, max_short_lines=1.0, max_duplicate_line_characters=1.0,
    max_newlines_per_word=1e9,
)  # fmt: skip


def judge(text: str, **limits: object) -> str:
    """Return why a text goes, or an empty string; all other rules are off."""
    verdict = FineWeb(replace(FREE, **limits))(Document(id="0", source="s", text=text))
    return verdict.reason.partition(".")[2] if isinstance(verdict, Dropped) else ""


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("End.\n\n \nno end", {"min_end_mark_lines": 0.5}, ""),
        ("End.\n\n \nno end", {"min_end_mark_lines": 0.51}, "few_end_marks"),
        ("终。\nअंत।\nنهاية؟\nend!", {"min_end_mark_lines": 1.0}, ""),
        ("End. \nend…\nend:\nend\"\nend'", {"min_end_mark_lines": 0.01}, "few_end_marks"),
        (f"{'x' * 30}\n{'x' * 31}", {"max_short_lines": 0.5}, ""),
        (f"{'x' * 30}\n{'x' * 31}", {"max_short_lines": 0.49}, "short_lines"),
        ("abc\nab", {"max_short_lines": 0.4, "short_line_characters": 1}, ""),
        ("abc\nab\nabc", {"max_duplicate_line_characters": 0.375}, ""),
        ("abc\nab\nabc", {"max_duplicate_line_characters": 0.374}, "duplicate_lines"),
        ("abc\nab\n abc", {"max_duplicate_line_characters": 0.0}, ""),
        (" \n \nabc", {"max_duplicate_line_characters": 0.0}, ""),
        ("a b\nc d.\n", {"max_newlines_per_word": 0.4}, ""),
        ("a b\nc d.\n", {"max_newlines_per_word": 0.39}, "newlines"),
        ("\u200b\n\u200b", {"max_newlines_per_word": 9.0}, "newlines"),
        ("", {}, "empty"),
        ("\n \t\n", {}, "empty"),
    ],
)
def test_every_rule_at_its_limit(text: str, limits: dict[str, object], reason: str) -> None:
    assert judge(text, **limits) == reason


def test_prose_passes_and_lists_do_not() -> None:
    prose = Document(id="0", source="s", text="This is a long line of prose, well ended.\n" * 1)
    assert FineWeb()(prose) == Kept(prose)
    assert [(each.rule, each.passed) for each in FineWeb().findings(prose)] == [
        (f"fineweb.{rule}", True)
        for rule in ("empty", "few_end_marks", "short_lines", "duplicate_lines", "newlines")
    ]
    menu = Document(id="0", source="s", text="Home.\nAbout.\nContact.")
    assert FineWeb()(menu) == Dropped("fineweb.short_lines")
    loose = FineWeb(by_language=(("de", FREE),))
    assert isinstance(loose(replace(menu, language="de")), Kept)


def expected(text: str) -> list[float]:
    """Measure a text as datatrove 0.10.1 does, with the words of ``words.py``."""
    lines = [line for line in text.split("\n") if line.strip()]
    again = [line for k, line in enumerate(lines) if line in lines[:k]]
    ended = [line for line in lines if properties()[ord(line[-1])] & END_MARK]
    return [
        len(lines), len(ended) / len(lines), sum(len(line) <= 30 for line in lines) / len(lines),
        sum(map(len, again)) / len(text.replace("\n", "")),
        text.count("\n") / max(len(words(text)), 1e-300),
    ]  # fmt: skip


@given(st.text(st.sampled_from("ab.。 \n\r\x1c—é"), max_size=80).filter(str.strip))
def test_measures_equal_plain_python(text: str) -> None:
    assert [each.value for each in measures(text, LIMITS)] == expected(text)
