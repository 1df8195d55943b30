"""Limits by language: the bundled file, a user's file, and what is refused."""

import json
from pathlib import Path

import pytest

from data_pipeline.config.rules import FineWebConfig, GopherQualityConfig, GopherRepetitionConfig
from data_pipeline.filters.language_limits import limits_by_language, thresholds_version
from data_pipeline.text.words import words
from llmtrain.errors import ConfigError, DataError


def test_fineweb2_has_its_published_numbers() -> None:
    quality = dict(limits_by_language(GopherQualityConfig(), "gopher_quality", "fineweb2"))
    assert len(quality) == 37
    german = quality["de"]
    assert (german.min_mean_word_length, german.max_mean_word_length) == (0.0, 15.0)
    assert german.min_alphabetic_words == 0.774
    assert german.stop_words[:3] == ("der", "und", "die")
    assert german.min_words == 50
    section = GopherRepetitionConfig(reading="massiveweb")
    repetition = dict(limits_by_language(section, "gopher_repetition", "fineweb2"))["ja"]
    assert repetition.reading == "massiveweb"
    assert repetition.max_duplicate_lines == 0.328
    assert repetition.max_duplicate_paragraphs is None
    assert repetition.max_duplicate_ngram_characters == (0.243, 0.225, 0.207, 0.19, 0.175, 0.159)
    fineweb = dict(limits_by_language(FineWebConfig(), "fineweb", "fineweb2"))["fr"]
    assert fineweb == FineWebConfig(
        min_end_mark_lines=0.1, max_short_lines=1.0, max_duplicate_line_characters=0.1,
        max_newlines_per_word=0.185,
    )  # fmt: skip


def test_a_file_of_ones_own_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({"languages": {"nn": {"fineweb": {"max_short_lines": 1}}, "a": {}}}))
    section = FineWebConfig(min_end_mark_lines=0.5)
    assert limits_by_language(section, "fineweb", str(path)) == (
        ("a", section),
        ("nn", FineWebConfig(min_end_mark_lines=0.5, max_short_lines=1)),
    )
    version = thresholds_version(str(path))
    assert version is not None
    assert version.startswith("limits.json ")
    path.write_text(path.read_text() + " ")
    assert thresholds_version(str(path)) != version
    assert thresholds_version(None) is None
    assert limits_by_language(section, "fineweb", None) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"languages": {"de": {"fineweb": {"min_word": 1}}}}, "de.fineweb sets min_word; expected"),
        ({"languages": {"de": {"fineweb": {"max_short_lines": "x"}}}}, "='x' is a str; use"),
        ({"languages": {"de": {"fineweb": {"per_language": "x"}}}}, "sets per_language"),
        ({"languages": {"de": {"fineweb": {"max_short_lines": None}}}}, "=None is a NoneType; use"),
        ({"languages": {"de": {"fineweb": {"max_short_lines": True}}}}, "=True is a bool; use"),
        ({"languages": {"de": {"fineweb": {"max_short_lines": [1]}}}}, r"=\(1,\) is a tuple; use"),
        ({"languages": {"de": {"fineweb": {"short_line_characters": 1.5}}}}, "=1.5 is a float"),
    ],
)  # fmt: skip
def test_fields_that_are_none_are_refused(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "limits.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        limits_by_language(FineWebConfig(), "fineweb", str(tmp_path / "limits.json"))


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"de": {}}', '{"languages": {"de": {"c4": {}}}}', '{"languages": 3}',
                '{"languages": {"de": {"fineweb": 3}}}', '{"languages": {"de": 3}}'],
)  # fmt: skip
def test_files_of_another_form_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "limits.json").write_text(content)
    with pytest.raises(DataError, match="not of the expected form"):
        limits_by_language(FineWebConfig(), "fineweb", str(tmp_path / "limits.json"))
    with pytest.raises(DataError, match=r"cannot be read.*fineweb2"):
        limits_by_language(FineWebConfig(), "fineweb", str(tmp_path / "absent.json"))


def test_languages_cut_otherwise_than_here_are_not_asked_for_stop_words() -> None:
    quality = dict(limits_by_language(GopherQualityConfig(), "gopher_quality", "fineweb2"))
    free = {code for code, limits in quality.items() if limits.min_stop_words == 0}
    assert free == {"ko", "th"}
    assert quality["th"].min_mean_word_length == 0.0
    for code in set(quality) - free:
        found = [word for word in quality[code].stop_words if len(words(word)) == 1]
        assert len(found) >= 8, code
