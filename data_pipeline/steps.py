"""Which rules a stage of single documents applies, by name, so that workers can build them.

Rules load models; a worker builds each once and keeps it for the tasks that follow.

    build_step(StepSpec("c4", (("variant", "c4_fast"),)))
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import blake3

from data_pipeline.config import PipelineConfig
from data_pipeline.filters.c4 import C4_VARIANTS, BadWords, C4Lines, read_bad_words
from data_pipeline.language import IdentifyLanguage, identifier_version
from data_pipeline.step import Step


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A rule and its settings, hashable and picklable."""

    name: str
    """Key of ``STEPS``."""
    options: tuple[tuple[str, Any], ...] = ()
    """Settings."""


def step_specs(stage: str, config: PipelineConfig) -> tuple[StepSpec, ...]:
    """Return the rules of a stage as the configuration has them; none where it leaves them out."""
    if stage == "c4":
        return (StepSpec("c4", (("variant", config.c4.variant),)),)
    if stage == "language":
        return (StepSpec("language", tuple(asdict(config.language).items())),)
    if config.bad_words.path is None:
        return ()
    words = read_bad_words(Path(config.bad_words.path))
    return (StepSpec("bad_words", (("words", words), ("language", config.bad_words.language))),)


def step_settings(stage: str, config: PipelineConfig) -> dict[str, Any]:
    """Return what a stage's manifest says about its rules."""
    if stage == "c4":
        options = C4_VARIANTS[config.c4.variant]
        return {"variant": config.c4.variant, **asdict(options)}
    if stage == "language":
        version = identifier_version(config.language.method)
        return {**asdict(config.language), "identifier": version}
    if config.bad_words.path is None:
        return {"list": "none was given; no page was tested"}
    words = read_bad_words(Path(config.bad_words.path))
    digest = blake3.blake3("\n".join(words).encode()).hexdigest(length=16)
    return {"language": config.bad_words.language, "list": digest, "words": len(words)}


def _c4(variant: str) -> Step:
    return C4Lines(C4_VARIANTS[variant])


@lru_cache(maxsize=16)
def build_step(spec: StepSpec) -> Step:
    """Return the rule of a spec; a worker keeps what it has built."""
    return STEPS[spec.name](**dict(spec.options))


STEPS: dict[str, Callable[..., Step]] = {
    "c4": _c4,
    "language": IdentifyLanguage,
    "bad_words": BadWords,
}
"""Rule name -> what builds it from the options of its spec."""
