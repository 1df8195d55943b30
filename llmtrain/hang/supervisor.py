"""The process beside the ranks of a machine: says who holds the run up, and ends it.

train/watchdog.py starts it, one per machine, however the ranks were started. It sleeps, reads a few
words of every rank, and ends with them. Where several machines take part, those whose ranks stand
tell of them in the folder of the run, and the one with rank 0 judges.

Invariant: it imports no torch; while ranks move it writes nothing and looks at no file but theirs.
A standstill of this process itself (a suspended machine) counts for nobody.

    python -m llmtrain.hang.supervisor '{"beats": "/dev/shm/llmtrain-3f", "run": "runs/demo", ...}'
"""

import json
import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llmtrain.hang import report
from llmtrain.hang.heartbeat import Beat, Phase, ask_for_record, process_state, read_beat
from llmtrain.hang.job import Job, beat_path
from llmtrain.hang.nodes import Nodes
from llmtrain.hang.stacks import ask, place, waits
from llmtrain.hang.verdict import Sight, Verdict, hangs, judge

SLOW_PHASES = (Phase.START, Phase.EVALUATE, Phase.SAVE)
"""Phases that may take ``slow_s``, as the first step of a shape may."""

_LONGEST_PAUSE_S = 1.5
_LIVES_S = 5.0
_RECORD_S = 2.0


class Supervisor:
    """Watches the ranks of this machine until they are gone."""

    def __init__(self, job: Job) -> None:
        """Watch ``job``."""
        self._job = job
        self._pause_s = min(_LONGEST_PAUSE_S, job.deadline_s / 10)
        self._from_ns = self._last_ns = time.monotonic_ns()
        self._stacks: dict[int, str] = {}
        self._asked_at_ns = 0
        self._said_at_ns: int | None = None
        self._nodes = Nodes(job) if job.several_machines else None

    def run(self) -> None:
        """Look again and again; returns when every rank of this machine is done or gone."""
        orphaned = False
        while True:
            if orphaned:
                time.sleep(self._pause_s / 5)
            orphaned = orphaned or _closed_within(self._pause_s)
            beats = self._beats()
            here = [b for b in beats if process_state(b.pid, b.started) not in "XZ"]
            if orphaned and all(beat.phase is Phase.DONE for beat in here):
                if self._nodes is not None and self._asked_at_ns == 0:
                    self._nodes.close()
                return
            if self.look(beats):
                return

    def look(self, beats: list[Beat]) -> bool:
        """Look once; whether this ended the run."""
        now_ns = time.monotonic_ns()
        if now_ns - self._last_ns > (5 * self._pause_s + 5.0) * 1e9:
            self._from_ns = now_ns  # this process itself was stopped
        self._last_ns = now_ns
        sights = self._sights(beats, now_ns)
        if self._said_at_ns is not None and any(b.since_ns > self._said_at_ns for b in beats):
            self._said_at_ns = None  # it moves again
        if self._nodes is not None:
            return self._look_everywhere(self._nodes, beats, sights)
        if self._said_at_ns is not None or not hangs(sights):
            return False
        sights = self._with_stacks(beats, self._sights(self._beats(), time.monotonic_ns()))
        return hangs(sights) and self._tell(beats, sights, judge(sights))

    def _look_everywhere(self, nodes: Nodes, beats: list[Beat], sights: list[Sight]) -> bool:
        """Judge with the other machines, on that of rank 0; elsewhere do what was decided."""
        still_s = min((s.still_s for s in sights if s.phase != Phase.DONE.name), default=0.0)
        stands = hangs(sights)
        if still_s < self._job.deadline_s / 2 and not stands:
            nodes.rest()
            nodes.answer(sights)
            return False
        if stands:
            sights = self._with_stacks(beats, sights)
        everywhere = nodes.exchange(sights)
        if self._said_at_ns is not None:
            return False
        if self._job.first_rank > 0:
            return self._follow(nodes, beats, sights)
        if everywhere is None or not hangs(everywhere):
            return False
        return self._tell(beats, sights, judge(everywhere))

    def _tell(self, beats: list[Beat], sights: list[Sight], verdict: Verdict) -> bool:
        """Say who it was, keep the evidence, and end the run where that is asked for."""
        self._said_at_ns = time.monotonic_ns()
        ends = verdict.certain and self._job.ends
        folder = report.write_event(self._job, sights, verdict, ends)
        if ends:  # before any rank is ended, which whoever started them sees
            report.write_status(self._job, min(sight.step for sight in sights) - 1)
        if self._nodes is not None:
            self._nodes.decide(folder, ends)
        self._keep(folder, beats, sights)
        if ends:
            self._end(beats)
        return ends

    def _follow(self, nodes: Nodes, beats: list[Beat], sights: list[Sight]) -> bool:
        """Do what the machine of rank 0 has decided, where it has."""
        decided = nodes.decided()
        if decided is None:
            return False
        self._said_at_ns = time.monotonic_ns()
        folder, ends = decided
        self._keep(folder, beats, sights)
        if ends:
            self._end(beats)
        return ends

    def _beats(self) -> list[Beat]:
        paths = (beat_path(self._job.beats, rank) for rank in self._job.ranks)
        return [beat for path in paths if (beat := read_beat(path)) is not None]

    def _sights(self, beats: list[Beat], now_ns: int) -> list[Sight]:
        job = self._job
        found = []
        for beat in beats:
            still_s = (now_ns - max(beat.since_ns, self._from_ns)) / 1e9
            quiet_s = (now_ns - max(beat.alive_ns, self._from_ns)) / 1e9
            state = process_state(beat.pid, beat.started)
            lives = quiet_s < max(_LIVES_S, job.deadline_s / 2)
            slow = beat.slow or beat.phase in SLOW_PHASES
            allowed_s = job.slow_s if slow else job.deadline_s
            stale = still_s > allowed_s or (not lives and quiet_s > allowed_s)
            if state in "TtXZ":  # no phase excuses that
                stale = max(still_s, quiet_s) > job.deadline_s
            found.append(Sight(
                rank=beat.rank, host=job.host, pid=beat.pid, step=beat.step,
                phase=beat.phase.name, where=beat.sentence, still_s=still_s, state=state,
                lives=lives, waits=beat.phase is Phase.COLLECTIVE, stale=stale,
            ))  # fmt: skip
        return found

    def _with_stacks(self, beats: list[Beat], sights: list[Sight]) -> list[Sight]:
        """Ask the ranks that run for their stacks, which tell whether they wait for others."""
        threads = {beat.rank: beat.main_thread for beat in beats}
        running = {s.rank: s.pid for s in sights if s.lives and s.state not in "TtXZ"}
        if self._asked_at_ns < max(beat.since_ns for beat in beats):
            self._asked_at_ns = time.monotonic_ns()
            self._stacks = ask(running, self._job.beats)
        return [
            sight if sight.rank not in self._stacks else replace(
                sight, waits=waits(self._stacks[sight.rank], threads[sight.rank]),
                frame=place(self._stacks[sight.rank], threads[sight.rank]),
            )
            for sight in sights
        ]  # fmt: skip

    def _keep(self, folder: Path, beats: list[Beat], sights: list[Sight]) -> None:
        """Write stacks, states and flight records of the ranks of this machine."""
        living = [s.rank for s in sights if s.lives and s.state not in "TtXZ"]
        for rank in living:
            with suppress(OSError):
                ask_for_record(beat_path(self._job.beats, rank))
        report.write_ranks(folder, sights, self._stacks)
        deadline = time.monotonic() + _RECORD_S
        while time.monotonic() < deadline and not report.has_records(self._job.beats, living):
            time.sleep(0.05)
        report.move_records(self._job.beats, folder, living)

    def _end(self, beats: list[Beat]) -> None:
        """End the ranks of this machine; whoever started them sees it and starts them again."""
        if self._nodes is not None:
            self._nodes.meet()
        for beat in beats:
            if process_state(beat.pid, beat.started) not in "XZ":
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)


def _closed_within(seconds: float) -> bool:
    """Wait so long, or until who started this process has closed its end of the pipe."""
    readable, _, _ = select.select([0], [], [], seconds)
    return bool(readable) and os.read(0, 4096) == b""


def main(words: list[str]) -> int:
    """Supervise the job that the first word describes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks, with whom this ends
    if os.fork():
        return 0  # at once, so that nobody has to wait for the other
    job = Job.of(json.loads(words[0]))
    try:
        Supervisor(job).run()
    finally:
        shutil.rmtree(job.beats, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
