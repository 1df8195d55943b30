"""The rules for single documents by name, and the form in which they travel to workers.

Rules load models; a worker builds each once and keeps it for the tasks that follow.

    build_step(StepSpec("c4", (("variant", "c4_fast"),)))
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_pipeline.config.run import PipelineConfig
from data_pipeline.filters.bad_words import BAD_WORDS
from data_pipeline.filters.c4 import C4
from data_pipeline.filters.decontaminate import DECONTAMINATE
from data_pipeline.filters.fineweb import FINEWEB
from data_pipeline.filters.gopher_quality import GOPHER_QUALITY
from data_pipeline.filters.gopher_repetition import GOPHER_REPETITION
from data_pipeline.filters.language import LANGUAGE
from data_pipeline.filters.pii import PII
from data_pipeline.filters.quality import QUALITY
from data_pipeline.filters.url_filter import URL_FILTER
from data_pipeline.step import Step, StepKind


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A rule and its settings, hashable and picklable."""

    name: str
    """Key of ``STEPS``."""
    options: tuple[tuple[str, Any], ...] = ()
    """Arguments of its ``build``."""


def step_spec(name: str, config: PipelineConfig) -> StepSpec | None:
    """Return the rule as the configuration has it; None where it leaves it out."""
    options = STEPS[name].options(config)
    return None if options is None else StepSpec(name, tuple(options.items()))


def step_settings(name: str, config: PipelineConfig) -> dict[str, Any]:
    """Return what a stage's manifest says about a rule."""
    return STEPS[name].settings(config)


@lru_cache(maxsize=64)
def build_step(spec: StepSpec) -> Step:
    """Return the rule of a spec; a worker keeps what it has built."""
    return STEPS[spec.name].build(**dict(spec.options))


STEPS: dict[str, StepKind] = {
    "url_filter": URL_FILTER,
    "language": LANGUAGE,
    "c4": C4,
    "gopher_repetition": GOPHER_REPETITION,
    "gopher_quality": GOPHER_QUALITY,
    "fineweb": FINEWEB,
    "pii": PII,
    "quality": QUALITY,
    "bad_words": BAD_WORDS,
    "decontaminate": DECONTAMINATE,
}
"""Stage name -> how its rule is made; one line each, from the module of the rule."""
