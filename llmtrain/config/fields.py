"""What config sections share: range checks, and the mark of fields a resume may not change.

A field (or a whole section) declared with ``field(metadata=FATAL)`` keeps its value for the life of
a run; every other field may change when the same command runs again.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FATAL: Mapping[str, str] = MappingProxyType({"resume": "fatal"})
"""Metadata of a field that decides which run this is."""

FATAL_NAMES: Mapping[str, str] = MappingProxyType({"resume": "names"})
"""Metadata of a mapping whose names decide which run this is; its values may change."""


def below(config: Any, low: float, *names: str) -> list[str]:
    """A problem for each named field that is set and below ``low``."""
    return [
        f"{name}={value} must be at least {low}"
        for name in names
        if isinstance(value := getattr(config, name), (int, float)) and value < low
    ]


def not_positive(config: Any, *names: str) -> list[str]:
    """A problem for each named field that is set and not a finite number above 0."""
    return [
        f"{name}={value} must be above 0 and finite"
        for name in names
        if (value := getattr(config, name)) is not None and not (math.isfinite(value) and value > 0)
    ]


def outside(config: Any, low: float, high: float, *names: str) -> list[str]:
    """A problem for each named field outside ``[low, high]``."""
    return [
        f"{name}={value} must be between {low} and {high}"
        for name in names
        if not low <= (value := getattr(config, name)) <= high
    ]
