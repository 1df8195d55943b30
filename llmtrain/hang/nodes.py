"""What the machines of a run tell each other, once their ranks stand, through the run's folder.

Every machine has one file, replaced as a whole. The first is written at the start: a machine that
was there and then tells nothing does not run, one that never was sees another folder.

Invariant: while ranks move nothing is written, and one name is looked up ten times in a deadline.

    nodes = Nodes(job)
    nodes.exchange(sights)          # with what the other machines tell; None until all have told
    nodes.decide(folder, ends=True) # on the machine of rank 0
    nodes.decided()                 # on the others
    nodes.meet()                    # once the evidence is kept: a rank that ends takes others along
"""

import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtrain.hang.job import Job
from llmtrain.hang.verdict import Sight

_ANSWER_S = 3.0
"""Beside a fifth of the deadline: how long a machine may tell nothing while others stand."""
_MEET_S = 10.0


class Nodes:
    """This machine among all of the run."""

    def __init__(self, job: Job) -> None:
        """Say that this machine takes part."""
        self._job = job
        self._number = 0
        self._seen: dict[str, tuple[int, float]] = {}
        self._looked = time.monotonic()
        self._asked: float | None = None
        self._answer_s = _ANSWER_S + job.deadline_s / 5
        self._publish([])

    def answer(self, sights: list[Sight]) -> None:
        """Tell of ranks that move, where another machine asks; looks ten times in a deadline."""
        now = time.monotonic()
        if now - self._looked < self._job.deadline_s / 10:
            return
        self._looked = now
        if (self._job.shared / "asked").exists():
            self._publish(sights)

    def exchange(self, sights: list[Sight]) -> list[Sight] | None:
        """Tell of this machine's ranks; gives those of all, None while some may still answer.

        Machines that see another folder are left out after a while.
        """
        self._publish(sights)
        if self._asked is None:
            self._asked = time.monotonic()
            with suppress(OSError):
                (self._job.shared / "asked").touch()
        found = list(sights)
        for path in sorted(self._job.shared.glob("machine-*.json")):
            told = _read(path)
            if told is not None and told["first_rank"] != self._job.first_rank:
                found += self._of(path.name, told)
        if len(found) == self._job.world_size:
            return found
        return found if time.monotonic() - self._asked > 2 * self._answer_s else None

    def rest(self) -> None:
        """Ranks move again: ask nobody."""
        if self._asked is not None:
            self._asked = None
            self._seen.clear()
            with suppress(OSError):
                (self._job.shared / "asked").unlink()

    def close(self) -> None:
        """Take the folder away; called on the machine of rank 0 when there was no hang."""
        shutil.rmtree(self._job.shared, ignore_errors=True)

    def _of(self, name: str, told: dict[str, Any]) -> list[Sight]:
        """Ranks of another machine: as it tells, or as gone where it has stopped telling."""
        before, at = self._seen.get(name, (-1, 0.0))
        if told["number"] != before:
            self._seen[name] = told["number"], time.monotonic()
        elif time.monotonic() - at > self._answer_s:
            return _silent(told)
        return [Sight(**sight) for sight in told["sights"]]

    def decide(self, folder: Path, ends: bool) -> None:
        """Tell the other machines where to put what they know, and whether to end."""
        _write(self._job.shared / "decided.json", {"folder": str(folder), "ends": ends})

    def decided(self) -> tuple[Path, bool] | None:
        """What the machine of rank 0 decided, where it has."""
        told = _read(self._job.shared / "decided.json")
        return None if told is None else (Path(told["folder"]), bool(told["ends"]))

    def meet(self) -> None:
        """Wait until all machines have kept their evidence; not for long, one may be gone."""
        deadline = time.monotonic() + _MEET_S
        with suppress(OSError):
            (self._job.shared / f"kept-{self._job.first_rank:06d}").touch()
        while time.monotonic() < deadline and self._count("kept-*") < self._count("machine-*.json"):
            time.sleep(0.05)

    def _count(self, pattern: str) -> int:
        return len(list(self._job.shared.glob(pattern)))

    def _publish(self, sights: list[Sight]) -> None:
        self._number += 1
        _write(self._job.shared / f"machine-{self._job.first_rank:06d}.json", {
            "host": self._job.host, "first_rank": self._job.first_rank,
            "num_ranks": self._job.num_ranks, "number": self._number,
            "sights": [asdict(sight) for sight in sights],
        })  # fmt: skip


def _silent(told: dict[str, Any]) -> list[Sight]:
    """The ranks of a machine that does not answer."""
    ranks = range(told["first_rank"], told["first_rank"] + told["num_ranks"])
    known = {sight["rank"]: Sight(**sight) for sight in told["sights"]}
    return [
        known.get(rank) or Sight(
            rank=rank, host=told["host"], pid=0, step=0, phase="START", where="an unknown place",
            still_s=0.0, state="no answer from its machine", lives=False, waits=False, stale=True,
        )
        for rank in ranks
    ]  # fmt: skip


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told


def _write(path: Path, told: dict[str, Any]) -> None:
    """Replace a file as a whole; a full disk must not end the supervisor."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(told), encoding="utf-8")
        beside.replace(path)
