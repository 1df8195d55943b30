"""Who holds the others up, from what is seen of every rank once nothing moves.

First come ranks that do not run: ended, stopped, or with a liveness thread that stands still. Then
ranks that wait for their own batch; then ranks that are not inside a collective while others are.
A rank that waits for peers is a victim. Where all wait, the collectives themselves do not end.

Invariant: nothing here looks at a process or a clock; the same sights give the same verdict.

    verdict = judge(sights)
    verdict.guilty       # (3,)
    verdict.sentence     # rank 3 on node7 holds the run up: its process is stopped (state T) ...
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.hang.heartbeat import Phase

_STATES = {
    "T": "is stopped by a signal (state T)", "t": "is held by a debugger (state t)",
    "Z": "has ended (state Z)", "X": "has ended",
    "D": "waits for a disk (state D)",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is seen of one rank."""

    rank: int
    """Its number."""
    host: str
    """Machine it runs on."""
    pid: int
    """Its process there."""
    step: int
    """Step it works on."""
    phase: str
    """Name of its phase."""
    where: str
    """Step, phase and micro-batch in words."""
    still_s: float
    """Seconds since its last beat."""
    state: str
    """Letter of its process in /proc; X where it is gone."""
    lives: bool
    """Whether its liveness thread runs."""
    waits: bool
    """Whether it waits for peers."""
    stale: bool
    """Whether it has stood longer than its phase may take."""
    frame: str = ""
    """Innermost frame of its main thread; empty where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Who it was."""

    guilty: tuple[int, ...]
    """Ranks that hold the others up; empty where all wait for each other."""
    sentence: str
    """Who, since when, where."""
    certain: bool
    """Whether the run cannot go on by itself: somebody waits, or one of several does not run."""


def hangs(sights: Sequence[Sight]) -> bool:
    """Whether to judge: a rank stands by itself, or nothing moves that still has time."""
    there = [sight for sight in sights if sight.phase != Phase.DONE.name]
    own = any(s.stale and (not _runs(s) or s.phase == Phase.DATA.name) for s in there)
    return own or (bool(there) and all(sight.stale for sight in there))


def judge(sights: Sequence[Sight]) -> Verdict:
    """Name the ranks that hold the others up."""
    there = [sight for sight in sights if sight.phase != Phase.DONE.name]
    stopped = [sight for sight in there if not _runs(sight)]
    hungry = [sight for sight in there if sight.phase == Phase.DATA.name]
    busy = _behind([sight for sight in there if not sight.waits])
    somebody_waits = any(sight.waits for sight in there if _runs(sight))
    guilty = stopped or hungry or busy
    if not guilty:
        places = "; ".join(f"rank {s.rank} in {s.where}{_at(s)}" for s in there[:4])
        text = (
            f"every rank waits inside a collective for {min(s.still_s for s in there):.0f} s: "
            f"{places}; look for ranks in different collectives, else at the network"
        )
        return Verdict(guilty=(), sentence=text, certain=True)
    said = "; ".join(_said(sight) for sight in guilty[:4])
    more = f"; and {len(guilty) - 4} ranks more" if len(guilty) > 4 else ""
    victims = [sight.rank for sight in there if sight not in guilty]
    others = f"; {_ranks(victims)} waiting for it" if victims and somebody_waits else ""
    some_stopped = 0 < len(stopped) < len(there)  # all at once: a user who will go on
    certain = some_stopped or somebody_waits or (bool(hungry) and len(there) > 1)
    return Verdict(
        guilty=tuple(sight.rank for sight in guilty), sentence=said + more + others,
        certain=certain,
    )  # fmt: skip


_ORDER = {"DATA": 0, "FORWARD": 1, "BACKWARD": 1, "COLLECTIVE": 1, "OPTIMIZER": 2}
"""Phases of a step in their order; what follows the update comes last."""


def _behind(sights: list[Sight]) -> list[Sight]:
    """Those that are least far: on a GPU others may wait for a device that waits for them."""
    places = [(sight.step, _ORDER.get(sight.phase, 3)) for sight in sights]
    return [s for s, at in zip(sights, places, strict=True) if at == min(places)]


def _runs(sight: Sight) -> bool:
    return sight.lives and sight.state not in ("T", "t", "Z", "X")


def _said(sight: Sight) -> str:
    who = f"rank {sight.rank} (process {sight.pid} on {sight.host})"
    if not _runs(sight):
        what = _STATES.get(sight.state, f"does not let its own threads run (state {sight.state})")
        what = f"its process {what}"
    elif sight.phase == Phase.DATA.name:
        what = "it waits for its own batch"
    else:
        what = "it is not inside a collective"
    since = f"for {sight.still_s:.0f} s, in {sight.where}"
    return f"{who} holds the run up: {what} {since}{_at(sight)}"


def _at(sight: Sight) -> str:
    return f", at {sight.frame}" if sight.frame else ""


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]} is"
    shown = ", ".join(map(str, numbers[:8]))
    return f"ranks {shown}{' ...' if len(numbers) > 8 else ''} are"
