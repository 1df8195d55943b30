"""Run points of a sweep to their end, several at a time, whatever was killed before.

Invariant: what a trial came to is read from its run folder (status.json, metrics.jsonl), never from
a process that may be gone; a finished trial is not run again, an interrupted one goes on from its
checkpoint, and every number is the one an undisturbed sweep gives.

    trials = Trials(Path("runs/lr"), LocalTrials(words=("experiment=mine",)), Objective())
    found = trials.run([["optimizer.lr=1e-3"], ["optimizer.lr=3e-3"]])
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.logs import INTERRUPTED
from llmtrain.run.directory import RunDirectory, read_json
from llmtrain.sweep.objective import Objective
from llmtrain.sweep.record import Record, Trial, figure, named
from llmtrain.sweep.trial_job import TrialJob

logger = logging.getLogger(__name__)

STARTS = 4
"""Starts of a trial within one command that may end without a word (killed, machine lost)."""
_LOOK_S = 0.2


class Running(Protocol):
    """A trial that was started."""

    def ended(self) -> int | None:
        """Exit status once all of its processes are gone, 1 where nothing is known of it."""

    def ask(self, interrupts: int) -> None:
        """Ask it to save and stop; each further interrupt is less patient."""


class Launch(Protocol):
    """Where trials run, and how many at a time."""

    @property
    def size(self) -> int:
        """Trials at a time."""

    def job(self, overrides: Sequence[str], folder: Path) -> TrialJob:
        """The run of a trial, found right; nothing is started.

        Raises:
            ConfigError: what is wrong with the point.
        """

    def start(self, trial: TrialJob) -> Running | None:
        """Start it; None where there is no room now."""


Watch = Callable[[int, Path], bool]
"""Called with the place of a point among ``points`` and its run folder: whether to end it early."""


class SweepStopped(Exception):  # noqa: N818 - a request, not an error
    """Trials were asked to stop and have; the same command goes on."""

    def __init__(self, status: int) -> None:
        """Take the exit status of the sweep."""
        super().__init__(f"stopped with status {status}")
        self.status = status


@dataclass(slots=True)
class _Asked:
    """What this process was asked for."""

    status: int | None = None
    interrupts: int = 0


@dataclass(slots=True)
class _Start:
    """A trial at work."""

    trial: Trial
    running: Running
    asked: int = 0
    pruned: bool = False


@dataclass(slots=True)
class Trials:
    """The trials of one sweep folder."""

    folder: Path
    """Folder of the sweep; every trial is a run in it."""
    launch: Launch
    """Where they run."""
    objective: Objective
    """What they are judged by."""
    retries: int = 0
    """How often a trial that ended with a fault is started again."""
    record: Record = field(init=False)
    """Their states."""

    def __post_init__(self) -> None:
        """Read what the folder holds."""
        self.record = Record(self.folder)

    def run(self, points: Sequence[Sequence[str]], watch: Watch | None = None) -> list[Trial]:
        """Run every point that is not finished; gives the trials in the order of ``points``.

        Raises:
            ConfigError: no trial was ever run here, and every point is refused.
            SweepStopped: the sweep was asked to stop, or a trial was, again and again.
        """
        trials = [self._settled(n, self.record.trial_of(p), watch) for n, p in enumerate(points)]
        open_ones = {trial.number: trial for trial in trials if not self._over(trial)}
        with _requests() as asked:
            batch = _Batch(self, asked, points, trials, watch)
            batch.work(list(open_ones.values()))
        if asked.status is not None:
            raise SweepStopped(asked.status)
        found = [self.record.trial_of(point) for point in points]
        if any(not trial.finished for trial in found):
            raise SweepStopped(3)
        return found

    def _over(self, trial: Trial) -> bool:
        """Whether nothing more is done about a trial."""
        return trial.finished and not self._again(trial)

    def _again(self, trial: Trial) -> bool:
        return trial.state == "failed" and trial.failures <= self.retries

    def _settled(self, place: int, trial: Trial, watch: Watch | None) -> Trial:
        """A trial that came to its end while nobody looked is taken as it ended."""
        if trial.state not in ("running", "stopped") or ended_code(trial.folder) != 0:
            return trial
        if watch and watch(place, trial.folder):
            return self.record.change(trial, "pruned")
        return self.record.change(trial, "done", self.objective.value(trial.folder))


class _Batch:
    """Points that run together."""

    def __init__(
        self,
        trials: Trials,
        asked: _Asked,
        points: Sequence[Sequence[str]],
        found: Sequence[Trial],
        watch: Watch | None,
    ) -> None:
        self.all = trials
        self.asked = asked
        self.points = points
        self.places = {trial.number: place for place, trial in enumerate(found)}
        self.watch = watch
        self.starts: dict[int, int] = {}
        self.told = False

    def work(self, queue: list[Trial]) -> None:
        """Run ``queue`` to its end, or until the sweep is asked to stop."""
        jobs, refused = self._jobs(queue)
        at_work = list[_Start]()
        while at_work or (queue and self.asked.status is None):
            while queue and self.asked.status is None:
                trial = queue[0]
                if trial.number in refused:
                    self._refuse(queue.pop(0), refused[trial.number])
                    continue
                running = self.all.launch.start(jobs[trial.number])
                if running is None:
                    break
                queue.pop(0)
                at_work.append(self._started(trial, running))
            time.sleep(_LOOK_S)
            for start in list(at_work):
                self._look(start)
                status = start.running.ended()
                if status is not None:
                    at_work.remove(start)
                    queue += self._ended(start, status)

    def _jobs(self, queue: Sequence[Trial]) -> tuple[dict[int, TrialJob], dict[int, ConfigError]]:
        """Runs by number, and what is wrong with the others."""
        jobs, refused = dict[int, TrialJob](), dict[int, ConfigError]()
        for trial in queue:
            try:
                jobs[trial.number] = self.all.launch.job(trial.overrides, trial.folder)
            except ConfigError as error:
                refused[trial.number] = error
        if refused and not jobs and not any(t.started for t in self.all.record.trials):
            raise next(iter(refused.values()))
        return jobs, refused

    def _refuse(self, trial: Trial, error: ConfigError) -> None:
        self.all.record.change(trial, "failed")
        logger.error("%s, %s: %s", trial.folder.name, " ".join(trial.overrides), error)

    def _started(self, trial: Trial, running: Running) -> _Start:
        self.starts[trial.number] = self.starts.get(trial.number, 0) + 1
        what = "goes on" if trial.started else "starts"
        values = " ".join(f"{n}={figure(v)}" for n, v in named(trial.overrides).items())
        logger.info("%s %s: %s", trial.folder.name, what, values)
        return _Start(self.all.record.change(trial, "running"), running)

    def _look(self, start: _Start) -> None:
        """Pass on what the sweep was asked for; end a trial that is not worth going on with."""
        if self.asked.status is not None and start.asked < max(1, self.asked.interrupts):
            if not self.told:
                logger.info("asking the trials to save and stop; Ctrl-C again ends them at once")
                self.told = True
            start.asked = max(1, self.asked.interrupts)
            start.running.ask(start.asked)
        place = self.places[start.trial.number]
        if self.watch and not start.pruned and self.watch(place, start.trial.folder):
            start.pruned, start.asked = True, max(1, start.asked)
            start.running.ask(1)

    def _ended(self, start: _Start, status: int) -> list[Trial]:
        """Note how a trial ended; gives it back where it is to be started again."""
        trial, record, objective = start.trial, self.all.record, self.all.objective
        code = ended_code(trial.folder)
        if code is None and status == 2:
            code = 2  # refused before there was anything to leave
        place = self.places[trial.number]
        if start.pruned or (self.watch and self.watch(place, trial.folder)):
            record.change(trial, "pruned")
            return []
        if code == 0:
            done = record.change(trial, "done", objective.value(trial.folder))
            logger.info("%s is done: %s", trial.folder.name, figure(done.value))
            return []
        if self.asked.status is not None and code in (None, 3):
            record.change(trial, "stopped")
            return []
        if code in (None, 3) and self.starts[trial.number] < STARTS:
            logger.warning("%s was ended from outside; it is started again", trial.folder.name)
            return [record.change(trial, "stopped")]
        failed = record.change(trial, "stopped" if code == 3 else "failed")
        logger.error("%s failed; %s says why", trial.folder.name, trial.folder / "logs")
        return [failed] if self.all._again(failed) and self.asked.status is None else []


def ended_code(folder: Path) -> int | None:
    """Exit status that a run has left; None where it was ended without a word."""
    try:
        return int(read_json(RunDirectory(folder).status_json)["code"])
    except (OSError, CheckpointError, KeyError):
        return None


@contextmanager
def _requests() -> Iterator[_Asked]:
    """Note Ctrl-C and SIGTERM instead of ending."""
    asked = _Asked()

    def note(number: int, frame: FrameType | None) -> None:
        asked.status = asked.status or (INTERRUPTED if number == signal.SIGINT else 3)
        asked.interrupts += number == signal.SIGINT

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
