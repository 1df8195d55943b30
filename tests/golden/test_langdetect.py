"""The compiled identifier gives langdetect's own numbers, in every process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory
from langdetect.lang_detect_exception import LangDetectException

from data_pipeline.filters.language import IDENTIFIERS
from data_pipeline.text.language_profiles import LanguageProfiles
from tests.texts import TEXTS


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
        "import sys; from data_pipeline.filters.language import IDENTIFIERS\n"
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
