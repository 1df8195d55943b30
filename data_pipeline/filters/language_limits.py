"""Limits by language for the filters: the bundled ones of FineWeb-2, or a file of the user's.

A file is JSON: {"source": "...", "languages": {"de": {"gopher_quality": {"min_words": 50}}}}. Keys
under a stage are the fields of its section in the configuration; what a language does not name
stays as the section has it. ``subset`` and ``note`` beside the stages are remarks. Codes of
languages are ISO-639-1, as the ``language`` stage writes them.

FineWeb-2 cut each language into words with a tool of its own. Where a script sets no spaces, words
are single characters here (Chinese, Japanese, Thai), so limits on n-grams are stricter there.

    limits_by_language(GopherQualityConfig(), "gopher_quality", "fineweb2")  # (("ar", ...), ...)
"""

import functools
import json
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin

import blake3

from data_pipeline.config.rules import FineWebConfig, GopherQualityConfig, GopherRepetitionConfig
from llmtrain.errors import ConfigError, DataError

Section = TypeVar("Section", GopherQualityConfig, GopherRepetitionConfig, FineWebConfig)

STAGES = ("fineweb", "gopher_quality", "gopher_repetition")
"""Stages whose limits may differ by language."""
_REMARKS = ("subset", "note")
BUNDLED = ("fineweb2",)
"""Names of the files that come with the package, in data_pipeline/filters/thresholds."""


def limits_by_language(
    section: Section, stage: str, source: str | None
) -> tuple[tuple[str, Section], ...]:
    """Return (language, section with its limits) for every language of a file, in their order.

    Raises:
        DataError: the file cannot be read or is no JSON of this form.
        ConfigError: it names a field that the section does not have, or a value it refuses.
    """
    if source is None:
        return ()
    languages = _languages(_content(source), source)
    result = []
    for code in sorted(languages):
        changes = languages[code].get(stage, {})
        result.append((code, _changed(section, changes, f"{source}: {code}.{stage}")))
    return tuple(result)


def thresholds_version(source: str | None) -> str | None:
    """Return what stands in a manifest for a file of limits: its name and its digest."""
    if source is None:
        return None
    digest = blake3.blake3(_content(source).encode()).hexdigest(length=16)
    return f"{Path(source).name} {digest}"


@functools.lru_cache(maxsize=8)
def _bundled(name: str) -> str:
    return (
        resources.files("data_pipeline.filters")
        .joinpath(f"thresholds/{name}.json")
        .read_text("utf-8")
    )


def _content(source: str) -> str:
    """Return the text of a file of limits."""
    if source in BUNDLED:
        return _bundled(source)
    try:
        return Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the limits per language {source} cannot be read ({error}); give the path of a UTF-8 "
            f"JSON file, or one of {list(BUNDLED)}"
        ) from error


def _languages(content: str, source: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return language -> stage -> changed fields."""
    try:
        languages = json.loads(content)["languages"]
        stages = [(name, each[name]) for each in languages.values() for name in each]
        well_formed = all(
            isinstance(changes, dict) for name, changes in stages if name in STAGES
        ) and all(name in (*STAGES, *_REMARKS) for name, _ in stages)
    except (ValueError, KeyError, TypeError, AttributeError):
        well_formed = False
    if not well_formed:
        raise DataError(
            f"the limits per language {source} are not of the expected form; use "
            '{"languages": {"de": {"gopher_quality": {"min_words": 50}}}} with the stages '
            f"{', '.join(STAGES)}"
        )
    result: dict[str, dict[str, dict[str, Any]]] = languages
    return result


def _changed(section: Section, changes: dict[str, Any], where: str) -> Section:
    """Return a section with some fields replaced."""
    known = {each.name: each.type for each in fields(section)}
    for name in ("per_language", "reading"):
        known.pop(name, None)
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError(f"{where} sets {unknown[0]}; expected one of {sorted(known)}")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    for name, value in values.items():
        if not _fits(value, known[name]):
            raise ConfigError(
                f"{where}.{name}={value!r} is a {type(value).__name__}; use a value like "
                f"{getattr(section, name)!r}"
            )
    changed: Section = replace(cast(Any, section), **values)
    return changed


def _fits(value: object, expected: Any) -> bool:
    """Whether a value has the type of a field; whole numbers are numbers, booleans are none."""
    accepted = get_args(expected) if isinstance(expected, UnionType) else (expected,)
    if value is None:
        return type(None) in accepted
    if isinstance(value, tuple):
        inner = [get_args(each)[0] for each in accepted if get_origin(each) is tuple]
        return bool(inner) and all(_fits(each, inner[0]) for each in value)
    return type(value) in accepted or (type(value) is int and float in accepted)
