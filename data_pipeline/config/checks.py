"""Rules that settings of many sections share."""

from dataclasses import MISSING, fields
from typing import Any

from llmtrain.errors import ConfigError


def check_positive(**numbers: float) -> None:
    """Raise ConfigError naming every number that is 0 or less."""
    problems = [
        f"{name}={value}; use a number above 0" for name, value in numbers.items() if value <= 0
    ]
    if problems:
        raise ConfigError(problems)


def check_share(share: float) -> None:
    """Raise ConfigError for a share of documents that is none."""
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"validation_share={share}; use a number in [0, 1)")


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed of the shuffle that 64 bits do not hold."""
    if not 0 <= seed < 2**64:
        raise ConfigError(f"shuffle_seed={seed}; use a number in [0, 2**64)")


def check_unread(section: Any, names: str, reader: str) -> None:
    """Raise ConfigError for fields that are not as they come while nothing reads them.

    ``names`` are those of the fields; ``reader`` is the setting with which they are read.
    """
    problems = [
        f"{field.name}={getattr(section, field.name)!r} is read with {reader} alone; set that, or "
        f"leave {field.name} out"
        for field in fields(section)
        if field.name in names.split() and getattr(section, field.name) != _default(field)
    ]
    if problems:
        raise ConfigError(problems)


def _default(field: Any) -> Any:
    made = field.default_factory
    return field.default if made is MISSING else made()
