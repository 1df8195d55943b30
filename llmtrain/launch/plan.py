"""What a launch comes to: text that shows it, and a function that does it.

Every target is a function from the configuration to a Plan; making one starts nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """One launch, ready."""

    shown: str
    """Exactly what would run, as a shell or the cluster reads it."""
    start: Callable[[], int]
    """Runs or submits it; returns the exit status."""
