"""Scores documents by quality and keeps the good ones, or a random choice that favours them.

The score goes into ``metadata["quality"]`` with six digits, and decisions are made from these. With
``keep=pareto`` a document stays where a draw from a Pareto distribution is above 1 - score, as for
GPT-3 (arXiv:2005.14165, appendix A); the draw is a hash of its id, so it is the same in every run.

    Quality(config, digest).judge_batch(documents)   # Kept, or Dropped("quality.low")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import blake3

from data_pipeline.config.content import QualityConfig
from data_pipeline.config.run import PipelineConfig
from data_pipeline.document import Document
from data_pipeline.filters.block_lists import ListFile, check_digest, file_digest
from data_pipeline.filters.command_scorer import CommandScorer
from data_pipeline.filters.text_classifier import TextClassifier
from data_pipeline.step import Dropped, Finding, Kept, StepKind, Verdict
from llmtrain.errors import ConfigError

SCORE = "quality"
"""Name in a document's metadata."""


class Scorer(Protocol):
    """Gives texts a score: the higher, the better."""

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the score of every text, in their order."""
        ...


class LinearScorer:
    """The model of a file made by ``llmtrain-data classifier``."""

    def __init__(self, model: TextClassifier) -> None:
        self._model = model

    def score(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of every text to be positive."""
        return [self._model.score(text) for text in texts]


def _linear(config: QualityConfig, digest: str) -> Scorer:
    path = str(config.model)
    check_digest(ListFile(path, digest))
    return LinearScorer(TextClassifier.load(Path(path)))


def _command(config: QualityConfig, digest: str) -> Scorer:
    return CommandScorer(config.command, config.command_time_limit_s)


SCORERS: Mapping[str, Callable[[QualityConfig, str], Scorer]] = {
    "linear": _linear,
    "command": _command,
}
"""By the name used in configurations; each takes the section and the digest of the model."""


def pareto_draw(document_id: str, alpha: float) -> float:
    """Return the draw of a document from the Lomax distribution that numpy calls pareto."""
    digest = blake3.blake3(b"quality " + document_id.encode()).digest(length=8)
    uniform = (int.from_bytes(digest, "big") + 0.5) / 2**64
    return float((1.0 - uniform) ** (-1.0 / alpha) - 1.0)


class Quality:
    """Labels documents with their score and drops the others."""

    name = "quality"

    def __init__(self, config: QualityConfig, digest: str) -> None:
        """Load the model, or get the program ready.

        Raises:
            DataError: the model is damaged or has changed since the run began.
        """
        self._config = config
        self._scorer = SCORERS[config.scorer](config, digest)

    def judge_batch(self, documents: Sequence[Document]) -> list[Verdict]:
        """Score some documents and judge each."""
        scores = self._scorer.score([document.text for document in documents])
        return [self._judge(d, f"{s:.6f}") for d, s in zip(documents, scores, strict=True)]

    def __call__(self, document: Document) -> Verdict:
        """Score one document and judge it."""
        return self.judge_batch([document])[0]

    def findings(self, document: Document) -> list[Finding]:
        """Return the score of a document and what it has to be."""
        score = float(f"{self._scorer.score([document.text])[0]:.6f}")
        least = self._least(document)
        limit = "no limit" if least is None else f"at least {least:.6f}"
        return [Finding("quality.low", score, limit, least is None or score >= least)]

    def _judge(self, document: Document, score: str) -> Verdict:
        least = self._least(document)
        if least is not None and float(score) < least:
            return Dropped("quality.low", ((SCORE, score),))
        return Kept(document.changed(metadata={**document.metadata, SCORE: score}))

    def _least(self, document: Document) -> float | None:
        """Return the smallest score that keeps a document."""
        if self._config.keep == "all":
            return None
        if self._config.keep == "threshold":
            return self._config.threshold
        return 1.0 - pareto_draw(document.id, self._config.alpha)


def _missing(section: QualityConfig) -> str:
    """Return what the section lacks to score anything."""
    if section.scorer == "linear":
        return "" if section.model else "model"
    return "" if section.command else "command"


def _digest(section: QualityConfig) -> str:
    """Return the digest of the model, or of the command's words and the files among them."""
    if section.scorer == "linear":
        path = Path(str(section.model))
        if not path.is_file():
            raise ConfigError(
                f"pipeline.quality.model={path} does not exist; train one with "
                "`llmtrain-data classifier`"
            )
        return file_digest(path)
    hasher = blake3.blake3()
    for word in section.command:
        path = Path(word)
        known = file_digest(path) if path.is_file() and path.suffix else word
        hasher.update(known.encode() + b"\0")
    return hasher.hexdigest(length=16)


def _options(config: PipelineConfig) -> dict[str, Any] | None:
    section = config.quality
    if _missing(section):
        return None
    return {"config": section, "digest": _digest(section)}


def _settings(config: PipelineConfig) -> dict[str, Any]:
    section = config.quality
    missing = _missing(section)
    if missing:
        return {"scorer": f"no {missing} was given; no page was scored"}
    settings = asdict(section)
    del settings["command_time_limit_s"]
    return {**settings, "digest": _digest(section)}


QUALITY = StepKind(build=Quality, options=_options, settings=_settings)
"""How the step comes out of the configuration."""
