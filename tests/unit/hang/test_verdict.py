"""Who is named, from what is seen of the ranks."""

from dataclasses import replace

import pytest

from llmtrain.hang.verdict import Sight, hangs, judge

WAITS = Sight(
    rank=0, host="n1", pid=11, step=7, phase="COLLECTIVE", where="step 7, collective",
    still_s=20.0, state="S", lives=True, waits=True, stale=True,
)  # fmt: skip


def sight(rank: int, phase: str = "COLLECTIVE", **fields: object) -> Sight:
    made = replace(WAITS, rank=rank, pid=rank + 11, phase=phase, where=f"step 7, {phase.lower()}")
    return replace(made, **{"waits": phase == "COLLECTIVE", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sights", "guilty", "words"),
    [
        ([sight(0), sight(1, state="T")], (1,), "rank 1 (process 12 on n1) holds the run up: its "
         "process is stopped by a signal (state T) for 20 s, in step 7, collective; rank 0 is"),
        ([sight(0), sight(1, state="X")], (1,), "its process has ended"),
        ([sight(0, "DATA"), sight(1, "FORWARD", lives=False)], (1,), "does not let its own"),
        ([sight(0, "DATA"), sight(1), sight(2)], (0,), "it waits for its own batch for 20 s"),
        ([sight(0, "BACKWARD", waits=True), sight(1, "SAVE")], (1,), "not inside a collective"),
        ([sight(0), sight(1, "FORWARD"), sight(2, "FORWARD")], (1, 2), "rank 0 is waiting"),
        # On a GPU the host of a victim waits for its device, ahead of the rank at fault.
        ([sight(0, "OBSERVE"), sight(1, "FORWARD"), sight(2)], (1,), "ranks 0, 2 are waiting"),
        ([sight(0), sight(1)], (), "every rank waits inside a collective for 20 s: rank 0 in step"),
    ],
)  # fmt: skip
def test_the_rank_at_fault_is_named(
    sights: list[Sight], guilty: tuple[int, ...], words: str
) -> None:
    verdict = judge(sights)
    assert verdict.guilty == guilty
    assert words in verdict.sentence
    assert verdict.certain


def test_ranks_that_all_compute_are_not_ended() -> None:
    assert not judge([sight(0, "FORWARD"), sight(1, "FORWARD")]).certain
    assert not judge([sight(0, "DATA")]).certain  # nobody waits for one process alone
    stopped = [sight(0, "FORWARD", state="T"), sight(1, state="T")]
    assert not judge(stopped).certain  # Ctrl-Z
    assert judge([stopped[0], sight(1, "FORWARD")]).certain


def test_what_is_no_hang() -> None:
    assert not hangs([])
    assert not hangs([sight(0), sight(1, "SAVE", stale=False)])  # which may take longer
    assert not hangs([sight(0, "DONE"), sight(1, "FORWARD", stale=False)])
    assert hangs([sight(0), sight(1, "SAVE"), sight(2, "DONE")])
    assert hangs([sight(0, stale=False), sight(1, "DATA")])
    assert hangs([sight(0, stale=False), sight(1, state="T")])
    assert not hangs([sight(0, stale=False), sight(1, "BACKWARD")])  # it may wait for the other
    assert not hangs([sight(0, "DONE", state="X")])


def test_many_ranks_make_one_short_sentence() -> None:
    sights = [sight(rank, state="X") for rank in range(8)]
    sights += [sight(rank) for rank in range(8, 20)]
    sentence = judge(sights).sentence
    assert "; and 4 ranks more; ranks 8, 9, 10, 11, 12, 13, 14, 15 ... are waiting" in sentence
