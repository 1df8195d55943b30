"""What the supervisor of a machine is told: whose ranks, how long, and what then.

job = Job.of(json.loads(words))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The ranks of one machine, and of which run they are."""

    beats: Path
    """Folder in memory of their heartbeats and stacks."""
    start: str
    """Name of this start of the run, alike on all machines."""
    run: Path
    """Folder of the run, which all machines share."""
    first_rank: int
    """The first rank of this machine."""
    num_ranks: int
    """Ranks of this machine, numbered one after the other."""
    world_size: int
    """Ranks of the run."""
    host: str
    """Name of this machine."""
    deadline_s: float
    """Seconds a rank may stand still."""
    slow_s: float
    """Seconds it may in a start, the first step of a shape, an evaluation or a save."""
    ends: bool
    """Whether to end the run."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Read what ``plain`` gave."""
        paths = {name: Path(plain[name]) for name in ("beats", "run")}
        return cls(**{**plain, **paths})

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "beats": str(self.beats), "run": str(self.run)}

    @property
    def ranks(self) -> range:
        """Ranks of this machine."""
        return range(self.first_rank, self.first_rank + self.num_ranks)

    @property
    def several_machines(self) -> bool:
        """Whether ranks of the run are elsewhere."""
        return self.num_ranks < self.world_size

    @property
    def shared(self) -> Path:
        """Folder through which the machines tell each other."""
        return self.run / "hang" / f".machines-{self.start}"


def beat_path(beats: Path, rank: int) -> Path:
    """File of a rank's heartbeat."""
    return beats / f"rank-{rank}"


def record_path(beats: Path, rank: int) -> Path:
    """File a rank writes its flight record to, whole."""
    return beats / f"record-{rank}.json"
