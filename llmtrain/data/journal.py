"""What a run decided about its data on the way; everything else follows from the configuration.

Batches are a function of the configuration, the step, and this journal: it is in every checkpoint
and in the run folder, so that the batch of a step can be told without a training process.

    journal = read_journal(Path("runs/demo/journal.json"))
    journal.units_skipped(step)
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtrain.errors import DataError

SHARE_UNIT = 65_536
"""Shares of an adaptive mixture are whole numbers of one part in this many."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Units of the stream that no step takes."""

    step: int
    """0-based step from which on all units are later ones."""
    num_units: int
    """Units left out before it."""
    by_guard: bool = False
    """Whether the run decided it (guard.on_spike), and not its configuration (data.skip_steps)."""


@dataclass(frozen=True, slots=True)
class ShareChange:
    """Shares of the sources from one unit on, as an adaptive mixture chose them."""

    first_unit: int
    """Global window from which on they hold."""
    shares: tuple[int, ...]
    """Parts of SHARE_UNIT each source gets, in order of names; they sum to it."""
    state: tuple[float, ...] = ()
    """What the rule goes on from: one number per source."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A changed corpus that the run was told to go on with."""

    step: int
    """Steps done when it changed."""
    changes: tuple[str, ...]
    """What was and what is, a line for each fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """Decisions in the order in which they hold."""

    skips: tuple[Skip, ...] = ()
    """Windows left out."""
    shares: tuple[ShareChange, ...] = ()
    """Decisions of an adaptive mixture."""
    accepted: tuple[Accepted, ...] = ()
    """Changes of the corpus."""
    undecided: tuple[tuple[float, float], ...] = ()
    """Adaptive mixture: (loss sum, targets) of each source since the last decision, at a save."""

    def units_skipped(self, step: int) -> int:
        """Return how many units are left out before 0-based step ``step``."""
        return sum(skip.num_units for skip in self.skips if skip.step <= step)

    def to_plain(self) -> dict[str, Any]:
        """Return the journal as JSON can hold it."""
        return asdict(self)


def from_plain(plain: Mapping[str, Any]) -> Journal:
    """Return the journal that ``Journal.to_plain`` gave."""
    return Journal(
        skips=tuple(Skip(**skip) for skip in plain.get("skips", ())),
        shares=tuple(
            ShareChange(s["first_unit"], tuple(s["shares"]), tuple(s.get("state", ())))
            for s in plain.get("shares", ())
        ),
        accepted=tuple(Accepted(a["step"], tuple(a["changes"])) for a in plain.get("accepted", ())),
        undecided=tuple((float(loss), float(n)) for loss, n in plain.get("undecided", ())),
    )


def read_journal(path: Path) -> Journal:
    """Read the journal of a run folder; a run that decided nothing has none.

    Raises:
        DataError: the file is damaged.
    """
    if not path.is_file():
        return Journal()
    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); resume the run to write it again from its checkpoint"
        ) from error
