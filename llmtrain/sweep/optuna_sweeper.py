"""Hydra's sweeper ``optuna``: Optuna suggests points in rounds, trials run them.

Invariant: a suggestion depends on the seed, its number and what earlier rounds gave, nothing else;
all of it is in ``SWEEP/optuna.journal`` before a trial starts, so a study that was killed goes on
as if it had not been. A round is as many trials as run at a time.

    llmtrain train -m hydra/sweeper=optuna hydra.sweeper.num_trials=20 \
        'optimizer.lr=tag(log,interval(1e-4,1e-2))'
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import blake3
import optuna
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from optuna.samplers import BaseSampler, CmaEsSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import TrialState

from llmtrain.errors import ConfigError
from llmtrain.sweep.launchers import TrialLauncher
from llmtrain.sweep.pruning import Pruning
from llmtrain.sweep.record import Trial
from llmtrain.sweep.space import Space

logger = logging.getLogger(__name__)

Sampler = Literal["tpe", "random", "grid", "cma"]
SAMPLERS: tuple[Sampler, ...] = ("tpe", "random", "grid", "cma")
"""What hydra.sweeper.sampler may be."""
JOURNAL = "optuna.journal"
MakeSampler = Callable[[int, int], BaseSampler]
"""(number of the trial, of the field) -> its sampler."""


class OptunaSweeper(Sweeper):
    """Points by Optuna."""

    def __init__(
        self,
        sampler: Sampler,
        num_trials: int,
        startup_trials: int,
        seed: int,
        pruner: Literal["median"] | None,
        params: Mapping[str, str] | None,
    ) -> None:
        """Take the fields of conf/hydra/sweeper/optuna.yaml; ``params`` is read by the launcher.

        Raises:
            ConfigError: a field out of range, or a sampler whose package is not there.
        """
        problems = [
            f"hydra.sweeper.{name}={value} must be at least {least}"
            for name, value, least in (
                ("num_trials", num_trials, 1), ("startup_trials", startup_trials, 0),
                ("seed", seed, 0),
            )
            if value < least
        ]  # fmt: skip
        if sampler not in SAMPLERS:
            problems.append(f"hydra.sweeper.sampler={sampler} is none of {', '.join(SAMPLERS)}")
        if sampler == "cma" and importlib.util.find_spec("cmaes") is None:
            problems.append("hydra.sweeper.sampler=cma needs cmaes; run pip install 'cmaes>=0.12'")
        if pruner not in (None, "median"):
            problems.append(f"hydra.sweeper.pruner={pruner} is neither median nor null")
        if problems:
            raise ConfigError(problems)
        self.sampler, self.num_trials, self.seed = sampler, num_trials, seed
        self.startup_trials, self.pruner = startup_trials, pruner

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher.

        Raises:
            ConfigError: a launcher that does not run trials.
        """
        launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)
        if not isinstance(launcher, TrialLauncher):
            raise ConfigError(
                "hydra/sweeper=optuna needs hydra/launcher=local or hydra/launcher=slurm"
            )
        self.launcher: TrialLauncher = launcher

    def sweep(self, arguments: list[str]) -> list[Trial]:
        """Ask, run and tell until ``num_trials`` are told."""
        space = Space.of(list(self.launcher.swept.values()))
        if not space.distributions:
            raise ConfigError(
                "hydra/sweeper=optuna has nothing to choose; add "
                "'optimizer.lr=tag(log,interval(1e-4,1e-2))'"
            )
        study = self._study()
        total = self.num_trials
        if self.sampler == "grid":
            total = min(total, math.prod(map(len, space.grid().values())))
        rounds = _Rounds(study, self.launcher.trials.launch.size, total)
        found = list[Trial]()
        while points := rounds.ask(partial(self._sampler, space), space):
            pruning = (
                Pruning(study, points, self.launcher.trials.objective) if self.pruner else None
            )
            words = [space.words(study.trials[number].params) for number in points]
            trials = self.launcher.trials.run(words, None if pruning is None else pruning.watch)
            for number, trial in zip(points, trials, strict=True):
                rounds.tell(number, trial)
            found += trials
        return found

    def _study(self) -> Study:
        """The study of this folder."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = self.launcher.trials.folder / JOURNAL
        _cut_torn_line(path)
        lock: Any = _Held()
        backend = JournalFileBackend(str(path), lock_obj=lock)
        return optuna.create_study(
            storage=JournalStorage(backend),
            study_name=self.launcher.trials.folder.name,
            direction=self.launcher.objective.direction,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=max(1, self.startup_trials // 2), n_warmup_steps=Pruning.WARM_UP
            )
            if self.pruner
            else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def _sampler(self, space: Space, number: int, field: int) -> BaseSampler:
        """The sampler of one field of one suggestion, whose random numbers are its own."""
        name = f"{self.seed}/{number}/{field}".encode()
        seed = int.from_bytes(blake3.blake3(name).digest(length=4), "little")
        if self.sampler == "grid":
            return GridSampler(space.grid(), seed=self.seed)  # the seed is the order of the grid
        if self.sampler == "random":
            return RandomSampler(seed=seed)
        if self.sampler == "cma":
            return CmaEsSampler(seed=seed, n_startup_trials=self.startup_trials)
        return TPESampler(
            seed=seed,
            n_startup_trials=self.startup_trials,
            constant_liar=self.launcher.trials.launch.size > 1,
        )


class _Rounds:
    """The trials of a study, a round at a time."""

    def __init__(self, study: Study, size: int, total: int) -> None:
        self.study, self.size, self.total = study, size, total

    def ask(self, sampler: MakeSampler, space: Space) -> list[int]:
        """Numbers of the round at hand, those of a round that was interrupted among them."""
        trials = self.study.trials
        begun = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
        for number in begun:  # the killed process may not have come to every field
            self.study.sampler = sampler(number, 0)
            unfinished = optuna.trial.Trial(self.study, trials[number]._trial_id)
            self._suggest(unfinished, sampler, space)
        begin = begun[0] // self.size * self.size if begun else len(trials)
        told = any(trial.number >= begin and trial.state.is_finished() for trial in trials)
        end = len(trials) if told else max(len(trials), min(begin + self.size, self.total))
        for number in range(len(trials), end):
            self.study.sampler = sampler(number, 0)
            self._suggest(self.study.ask(), sampler, space)
            begun.append(number)
        return begun

    def _suggest(self, trial: optuna.Trial, sampler: MakeSampler, space: Space) -> None:
        """Let every field begin with random numbers of its own; one that is there stays."""
        for field, (name, distribution) in enumerate(space.distributions.items()):
            self.study.sampler = sampler(trial.number, field)
            trial._suggest(name, distribution)

    def tell(self, number: int, trial: Trial) -> None:
        """Tell what a trial came to."""
        self.study.sampler = RandomSampler()  # a grid that is at its end would stop a loop
        ended = {"failed": TrialState.FAIL, "pruned": TrialState.PRUNED}.get(trial.state)
        if ended is None and trial.value is None:
            ended = TrialState.FAIL
        if ended is None:
            self.study.tell(number, trial.value)
        else:
            self.study.tell(number, state=ended)


class _Held:
    """The folder of a sweep is locked as a whole: the journal has one writer."""

    def acquire(self) -> bool:
        """Nothing to wait for."""
        return True

    def release(self) -> None:
        """Nothing to give back."""


def _cut_torn_line(path: Path) -> None:
    """Take away a last line that a killed writer did not finish."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
