"""Gopher's quality rules at their limits, and their counts against plain Python."""

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config.rules import GopherQualityConfig
from data_pipeline.document import Document
from data_pipeline.filters.gopher_quality import GopherQuality, measures
from data_pipeline.step import Dropped, Kept
from data_pipeline.text.code_points import SYMBOL, properties
from data_pipeline.text.words import words
from llmtrain.errors import ConfigError

LIMITS = GopherQualityConfig()
FREE = GopherQualityConfig(
    min_words=0, min_mean_word_length=0.0, max_mean_word_length=1e9, max_hash_ratio=1e9,
    max_ellipsis_ratio=1e9, max_bullet_lines=1.0, max_ellipsis_lines=1.0, min_alphabetic_words=0.0,
    min_stop_words=0,
)  # fmt: skip


def judge(text: str, **limits: object) -> str:
    """Return why a text goes, or an empty string; all other rules are off."""
    step = GopherQuality(replace(FREE, **limits))
    verdict = step(Document(id="0", source="s", text=text))
    return verdict.reason if isinstance(verdict, Dropped) else ""


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("one two three . ,", {"min_words": 3}, ""),
        ("one two three . ,", {"min_words": 4}, "few_words"),
        ("one two three . ,", {"max_words": 3}, ""),
        ("one two three . ,", {"max_words": 2}, "many_words"),
        ("a ab . abc", {"min_mean_word_length": 2.0}, ""),
        ("a ab . abc", {"min_mean_word_length": 2.1}, "short_words"),
        ("a ab ... abc", {"max_mean_word_length": 2.0}, ""),
        ("a ab ... abc", {"max_mean_word_length": 1.9}, "long_words"),
        ("# one two three", {"max_hash_ratio": 0.25}, ""),
        ("## one two three", {"max_hash_ratio": 0.25}, "hashes"),
        ("... one two three", {"max_ellipsis_ratio": 0.25}, ""),
        ("...... one two three", {"max_ellipsis_ratio": 0.25}, "ellipses"),
        ("..... one two three", {"max_ellipsis_ratio": 0.25}, ""),
        ("… … one two", {"max_ellipsis_ratio": 0.4}, "ellipses"),
        ("- a\n • b\nc", {"max_bullet_lines": 0.67}, ""),
        ("- a\n • b\nc", {"max_bullet_lines": 0.66}, "bullet_lines"),
        ("* a\n* b\nc", {"max_bullet_lines": 0.1}, ""),
        ("- a\n • b\nc", {"max_bullet_lines": 0.5, "bullets": ("•",)}, ""),
        ("a... \nb…\r\nc....\rd", {"max_ellipsis_lines": 0.75}, ""),
        ("a... \nb…\r\nc....\rd", {"max_ellipsis_lines": 0.74}, "ellipsis_lines"),
        ("..\n.", {"max_ellipsis_lines": 0.0}, ""),
        ("a 1 2 3 b", {"min_alphabetic_words": 0.4}, ""),
        ("a 1 2 3 b", {"min_alphabetic_words": 0.41}, "few_letters"),
        ("the be the The", {"min_stop_words": 2}, ""),
        ("the the The them", {"min_stop_words": 2}, "few_stop_words"),
        ("", {"min_words": 1}, "few_words"),
        (". ! ?", {"min_mean_word_length": 1.0}, "short_words"),
        ("", {"min_stop_words": 1}, "few_stop_words"),
    ],
)  # fmt: skip
def test_every_rule_at_its_limit(text: str, limits: dict[str, object], reason: str) -> None:
    assert judge(text, **limits) == (f"gopher_quality.{reason}" if reason else "")


def test_the_first_broken_rule_in_order_is_the_reason() -> None:
    verdict = GopherQuality()(Document(id="0", source="s", text="#"))
    assert verdict == Dropped("gopher_quality.few_words")


def test_prose_passes_and_stays_as_it_is() -> None:
    sentence = "We have come to that house with all the others of the village, and to be at rest. "
    document = Document(id="0", source="s", text=sentence * 4)
    assert GopherQuality()(document) == Kept(document)
    found = GopherQuality().findings(document)
    assert [each.rule.partition(".")[2] for each in found] == [
        "few_words", "many_words", "short_words", "long_words", "hashes", "ellipses",
        "bullet_lines", "ellipsis_lines", "few_letters", "few_stop_words",
    ]  # fmt: skip
    assert all(each.passed for each in found)
    assert found[0].value == 72
    assert found[0].limit == "at least 50"


def test_findings_go_on_after_a_rule_is_broken() -> None:
    found = GopherQuality().findings(Document(id="0", source="s", text="# a"))
    assert [each.rule for each in found if not each.passed] == [
        f"gopher_quality.{rule}"
        for rule in ("few_words", "short_words", "hashes", "few_letters", "few_stop_words")
    ]


def test_a_language_has_its_own_limits() -> None:
    german = replace(LIMITS, min_words=2, stop_words=("der", "und"), min_mean_word_length=0.0)
    step = GopherQuality(by_language=(("de", german),))
    text = "Der Hund und der Hof und das Haus"
    assert isinstance(step(Document(id="0", source="s", text=text, language="de")), Kept)
    assert isinstance(step(Document(id="0", source="s", text=text, language="fr")), Dropped)
    assert pickle.loads(pickle.dumps(step)) == step


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="use single characters"):
        GopherQualityConfig(bullets=("--",))
    with pytest.raises(ConfigError, match="use words without spaces"):
        GopherQualityConfig(stop_words=("of the",))


def expected(text: str) -> list[float]:
    """Measure a text as datatrove 0.10.1 does, with the words of ``words.py``."""
    split = words(text).texts()
    real = [w for w in split if any(not properties()[ord(c)] & SYMBOL for c in w)]
    lines = text.splitlines()
    mean = sum(map(len, real)) / len(real) if real else 0.0
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    letters = sum(any(map(str.isalpha, word)) for word in split)
    dots = text.count("...") + text.count("…")
    total, of_lines = len(split) or 1, len(lines) or 1
    return [
        len(real), len(real), mean, mean, text.count("#") / total, dots / total,
        bullets / of_lines, ellipses / of_lines, letters / total,
        len(set(LIMITS.stop_words) & set(split)),
    ]  # fmt: skip


TEXTS = st.text(
    st.one_of(st.sampled_from(list("ab #.…•-\n\r\x0b\u2028\u2029 1'é")), st.characters()),
    max_size=60,
)
PIECES = st.sampled_from(["the", "be", "that", "...", "....", "#", "\r\n", "\n", " ", "- ", "x1"])


@given(st.one_of(TEXTS, st.lists(PIECES, max_size=25).map("".join)))
def test_measures_equal_plain_python(text: str) -> None:
    measured = [each.value for each in measures(words(text), LIMITS)]
    wanted = expected(text)
    if not words(text).texts():
        wanted[4:6] = [float("inf") if value else 0.0 for value in wanted[4:6]]
    assert measured == wanted
