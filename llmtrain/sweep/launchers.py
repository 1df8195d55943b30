"""Hydra's launchers ``local`` and ``slurm``: they run the jobs of any sweeper as trials.

Invariant: what a sweeper gets back is the objective of each trial, in order; before the first one
starts the folder is known to be of this sweep, and no other process is at work on it.

    llmtrain train --multirun hydra/launcher=local hydra.launcher.jobs=2 optimizer.lr=1e-3,3e-3
"""

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from llmtrain.errors import ConfigError
from llmtrain.sweep.folder import default_name, identity, settle, shared
from llmtrain.sweep.local import LocalTrials
from llmtrain.sweep.objective import Objective
from llmtrain.sweep.task import SweepTask
from llmtrain.sweep.trials import Launch, Trials


class TrialLauncher(Launcher):
    """What both launchers share."""

    trials: Trials
    """The trials of the sweep; sweepers of this package run their points here."""
    swept: Mapping[str, str]
    """Name -> word of what is swept, by the sweeper's settings or on the command line."""

    def __init__(
        self,
        jobs: int | None,
        retries: int,
        metric: str | None,
        direction: Literal["minimize", "maximize"],
    ) -> None:
        """Take the fields of conf/hydra/launcher/NAME.yaml.

        Raises:
            ConfigError: a field out of range.
        """
        self.jobs, self.retries = jobs, retries
        problems = []
        if jobs is not None and jobs < 1:
            problems.append(f"hydra.launcher.jobs={jobs} must be at least 1")
        if retries < 0:
            problems.append(f"hydra.launcher.retries={retries} must be at least 0")
        if direction not in ("minimize", "maximize"):
            problems.append(
                f"hydra.launcher.direction={direction} is neither minimize nor maximize"
            )
        if problems:
            raise ConfigError(problems)
        self.objective = Objective(metric, direction)

    @abstractmethod
    def place(self, task: SweepTask, words: tuple[str, ...]) -> Launch:
        """Where the trials run."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Settle which sweep this is, and in which folder."""
        if not isinstance(task_function, SweepTask):
            raise TypeError(type(task_function))
        task, choices = task_function, config.hydra.runtime.choices
        sweeper: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=True)
        named = {name: f"{name}={text}" for name, text in (sweeper.get("params") or {}).items()}
        self.swept = {**named, **task.swept}
        found = identity(task.fixed, list(task.swept.values()), sweeper, self.objective)
        name = str(OmegaConf.select(config, "name") or default_name(found))
        folder = Path(os.path.expanduser(config.runs_dir)).absolute() / name
        place = self.place(task, tuple(shared(task.fixed)))
        with flag_override(config, ["struct", "readonly"], [False, False]):
            config.hydra.sweep.dir = str(folder)  # where Hydra's own sweeper keeps its settings
        task.enter(folder)
        settle(
            folder, found, command=task.command, sweeper=choices["hydra/sweeper"],
            launcher=choices["hydra/launcher"], parameters=list(self.swept),
        )  # fmt: skip
        self.trials = Trials(folder, place, self.objective, self.retries)
        task.trials = self.trials

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run points of a sweeper that knows nothing of trials."""
        names = set(self.swept)
        points = [
            [text.lstrip("+") for text in job if text.lstrip("+").partition("=")[0] in names]
            for job in job_overrides
        ]
        return [
            JobReturn(overrides=point, status=JobStatus.COMPLETED, _return_value=trial.value)
            for point, trial in zip(points, self.trials.run(points), strict=True)
        ]


class LocalLauncher(TrialLauncher):
    """Trials on this machine."""

    def place(self, task: SweepTask, words: tuple[str, ...]) -> Launch:
        """Share the devices of this machine out."""
        return LocalTrials(words, task.config_dirs, self.jobs, task.visible)


class SlurmLauncher(TrialLauncher):
    """Trials as jobs of Slurm."""

    def __init__(self, poll_s: float, **fields: Any) -> None:
        """Take the fields of conf/hydra/launcher/slurm.yaml."""
        super().__init__(**fields)
        if poll_s <= 0:
            raise ConfigError(f"hydra.launcher.poll_s={poll_s} must be above 0")
        self.poll_s = poll_s

    def place(self, task: SweepTask, words: tuple[str, ...]) -> Launch:
        """See that Slurm is here."""
        from llmtrain.sweep.slurm import SlurmTrials

        return SlurmTrials(words, task.config_dirs, self.jobs or 4, self.poll_s)
