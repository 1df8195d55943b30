"""Where the tokens are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config.fields import FATAL, FATAL_NAMES, below, outside
from llmtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FimConfig:
    """Fill-in-the-middle: documents whose middle part comes last (arXiv:2207.14255)."""

    rate: float
    """Share of the documents that are rearranged, above 0 and at most 1; anew in every epoch."""
    spm_rate: float = 0.5
    """Share of those with the suffix first; the others have the prefix first."""
    prefix_id: int
    """Id of the token before the prefix; the tokenizer has to have three that no text gives."""
    middle_id: int
    """Id of the token before the middle."""
    suffix_id: int
    """Id of the token before the suffix."""

    def __post_init__(self) -> None:
        """Refuse shares that are none and ids that cannot be told apart."""
        problems = outside(self, 0, 1, "spm_rate")
        if not 0 < self.rate <= 1:
            problems.append(f"rate={self.rate} must be above 0 and at most 1; fim=null is none")
        problems += below(self, 0, "prefix_id", "middle_id", "suffix_id")
        if len({self.prefix_id, self.middle_id, self.suffix_id}) < 3:
            problems.append(
                f"prefix_id={self.prefix_id}, middle_id={self.middle_id} and "
                f"suffix_id={self.suffix_id} must differ"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token stores by source name."""

    sources: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict, metadata=FATAL_NAMES)
    """Source name -> folder or address of its token store, or a list of several, for training.

    A store may move during a run: its content is compared with the checkpoint's fingerprint.
    """
    validation: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Source name -> folder or address of its held-out token store, or a list of several."""
    cache_dir: str | None = None
    """Folder on a local disk for what is read of remote stores (``s3://``, ``gs://``, ``file://``).

    Processes of a node share it; it grows to the size of what was read and is never emptied.
    """
    packing: Literal["concat", "best_fit"] = field(default="concat", metadata=FATAL)
    """What a window is: tokens in the order of the store, or documents that fit together.

    concat cuts at equal distances, through documents. best_fit cuts only documents longer than a
    window and pads less than 1 %; it needs ``llmtrain-data pack`` for every store.
    """
    fim: FimConfig | None = field(default=None, metadata=FATAL)
    """Fill-in-the-middle; null leaves every document as it is."""
    prefetch_batches: int = 2
    """Global batches read ahead of the step in a background thread; 0 reads when asked."""

    skip_steps: tuple[tuple[int, int], ...] = ()
    """First and last step whose batches are left out; every later step takes what follows them.

    Steps count from 1, as the log does. Only steps that the run has not done yet can be added.
    """
    accept_changed: bool = False
    """Go on with a run although its stores hold other data than before; the journal records it."""

    def __post_init__(self) -> None:
        """Refuse names that cannot be keys and negative read-ahead."""
        problems = below(self, 0, "prefetch_batches")
        problems += [
            f"{section} holds the name '{name}'; use letters, digits, '_' and '-'"
            for section in ("sources", "validation")
            for name in getattr(self, section)
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name)
        ]
        problems += [
            f"skip_steps holds [{first}, {last}]; use the first and the last step, from 1 on"
            for first, last in self.skip_steps
            if not 1 <= first <= last
        ]
        firsts = [first for first, _ in self.skip_steps]
        if sorted(set(firsts)) != firsts:
            problems.append(f"skip_steps has first steps {firsts}; give each once, in rising order")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """The tokenizer the stores were made with."""

    path: str | None = None
    """Tokenizer folder; checked against the stores' hash. Null skips the check and text output."""
