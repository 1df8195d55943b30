"""Bad words: the same verdicts as C4's expression, for any list and text."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.config.content import BadWordsConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.bad_words import BAD_WORDS, BadWords, word_lists
from data_pipeline.step import Dropped, Kept
from llmtrain.errors import ConfigError, DataError

LISTED = Dropped("bad_words.listed")


def document(text: str, language: str = "") -> Document:
    return Document(id="0", source="s", text=text, language=language)


def step(path: Path, *words: str, language: str = "en", max_share: float = 0.0) -> BadWords:
    path.write_text("\n".join(words), encoding="utf-8")
    return BadWords(lists=word_lists(str(path), language), language=language, max_share=max_share)


def test_words_stand_alone(tmp_path: Path) -> None:
    rule = step(tmp_path / "en", "Bad", "", "very bad", "c++", "***")
    for text in ("bad", "so BAD!", "a_b bad", "it is c++ here", "x *** y", "bad\u0307"):
        assert rule(document(text)) == LISTED
    for text in ("badge", "unbad", "bad_", "ccc", "c+", "x***y", "very", ""):
        assert isinstance(rule(document(text)), Kept)


def test_words_count_anywhere_where_scripts_set_no_spaces(tmp_path: Path) -> None:
    rule = step(tmp_path / "x", "悪い", language="ja")
    assert rule(document("とても悪い言葉", "ja")) == LISTED
    assert isinstance(rule(document("とても良い言葉", "ja")), Kept)
    share = step(tmp_path / "x", "悪い", language="ja", max_share=0.25)
    assert share(document("とても悪い言葉", "ja")) == LISTED  # 2 of 7 characters
    assert isinstance(share(document("とても悪い言葉です", "ja")), Kept)


def test_every_language_has_its_list(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("schlecht")
    (tmp_path / "en").write_text("bad")
    (tmp_path / "README.md").write_text("about")
    rule = BadWords(lists=word_lists(str(tmp_path), "en"))
    assert rule(document("bad", "en")) == LISTED
    assert rule(document("schlecht", "de")) == LISTED
    assert rule(document("bad")) == LISTED  # not identified: the list of `language`
    for text, language in (("bad", "de"), ("schlecht", "en"), ("bad", "fr"), ("schlecht", "")):
        assert isinstance(rule(document(text, language)), Kept)
        assert rule.findings(document(text, "fr")) == []


def test_a_share_of_listed_words_may_be_allowed(tmp_path: Path) -> None:
    rule = step(tmp_path / "en", "bad", "very bad", max_share=0.25)
    assert isinstance(rule(document("bad is one of these words, so")), Kept)
    assert rule(document("a very bad word")) == LISTED  # two of four
    assert rule.findings(document("a very bad word"))[0].value == "0.500000 (very bad)"
    assert isinstance(rule(document("a very bad word among more of those words")), Kept)
    with pytest.raises(ConfigError, match=r"max_share=1\.5"):
        BadWordsConfig(max_share=1.5)


def test_lists_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        step(tmp_path / "none", " ")
    with pytest.raises(DataError, match="cannot be read"):
        word_lists(str(tmp_path / "absent"), "en")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no list"):
        word_lists(str(tmp_path / "folder"), "en")


def test_without_a_list_the_rule_is_left_out_and_the_manifest_says_so(tmp_path: Path) -> None:
    config = PipelineConfig(stages=())
    assert BAD_WORDS.options(config) is None
    assert "no page was tested" in BAD_WORDS.settings(config)["list"]
    (tmp_path / "en").write_text("bad")
    config = PipelineConfig(stages=(), bad_words=BadWordsConfig(path=str(tmp_path / "en")))
    options = BAD_WORDS.options(config)
    assert options is not None
    assert BAD_WORDS.build(**options)(document("bad")) == LISTED
    before = BAD_WORDS.settings(config)
    (tmp_path / "en").write_text("worse")
    assert BAD_WORDS.settings(config) != before
    with pytest.raises(DataError, match="has changed"):
        BAD_WORDS.build(**options)


LETTERS = "abΣσςİi\u0307.+_ é-Ⓐ"


@settings(max_examples=100)
@given(
    words=st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=4), min_size=1, max_size=4),
    text=st.text(alphabet=LETTERS, max_size=24),
)
@example(words=["i"], text="İ")
@example(words=["ας"], text="ΑΣ")
def test_verdicts_are_those_of_the_published_expression(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], text: str
) -> None:
    listed = [word.strip().lower() for word in words if word.strip()]
    if not listed or any(word.startswith("#") for word in listed):
        return
    rule = step(tmp_path_factory.getbasetemp() / "words", *listed)
    pattern = re.compile(rf"(?:\W|^)({'|'.join(map(re.escape, listed))})(?:\W|$)")
    expected = pattern.search(text.lower()) is not None
    assert (rule(document(text)) == LISTED) == expected
    assert rule.findings(document(text))[0].passed != expected
