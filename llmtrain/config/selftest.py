"""What ``llmtrain selftest`` takes beside a training command line.

llmtrain selftest resume steps=20 more_steps=10 parallel.pp=2 data.sources.mine=stores/mine
"""

from dataclasses import dataclass
from typing import Literal

from llmtrain.config.fields import below
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SelftestConfig:
    """``llmtrain selftest resume``: a run that is killed goes on as if it had not been, bit by bit.

    It takes a training command line. Without data.sources it trains on random tokens, without
    model or experiment on llama_demo.
    """

    test: Literal["resume"] = "resume"
    """What to test; the word alone, ``resume``, says it too."""
    steps: int = 4
    """Steps before the checkpoint after which the run is killed."""
    more_steps: int = 4
    """Steps after it, in a fresh process; they are compared with those of a run not killed."""
    out: str | None = None
    """Folder to keep both runs in; null keeps none."""
    overrides: tuple[str, ...] = ()
    """The training command line; every other word of ``llmtrain selftest`` becomes part of it."""
    config_dirs: tuple[str, ...] = ()
    """Folders with more groups, absolute; ``--config-dir`` sets them."""

    def __post_init__(self) -> None:
        """Refuse tests of nothing."""
        if problems := below(self, 1, "steps", "more_steps"):
            raise ConfigError(problems)


OWN = frozenset({"test", "steps", "more_steps", "out"})
"""Overrides that selftest reads itself."""


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """The words for selftest itself, the bare name of a test among them, and those for training."""
    own, others = list[str](), list[str]()
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals and not key.startswith("~"):
            own.append(f"test={word}")
        else:
            (own if key in OWN else others).append(word)
    return own, others
