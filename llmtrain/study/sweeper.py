"""Hydra's sweeper ``study``: the trials of a ready study, its fit, its held-out trials.

Invariant: a study is a function of its trials' results; run again, it trains what is missing and
says the same.

    llmtrain train --multirun experiment=scaling_ladder hydra.launcher.jobs=2 data.sources.mine=DIR
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from llmtrain.config.run import RunConfig
from llmtrain.config.strict import build
from llmtrain.config.study import StudyConfig
from llmtrain.errors import ConfigError
from llmtrain.run.directory import read_json, write_json
from llmtrain.study.findings import Findings
from llmtrain.study.grid import lr_batch
from llmtrain.study.ladder import RunPoints, scaling_ladder
from llmtrain.study.mixture_search import mixture_search
from llmtrain.study.transfer import width_transfer
from llmtrain.sweep.folder import SWEEP_JSON
from llmtrain.sweep.record import named
from llmtrain.sweep.task import SweepTask
from llmtrain.sweep.trials import Trials

STUDIES: Mapping[str, Callable[[Any, RunPoints, RunConfig], Findings]] = {
    "lr_batch": lambda config, run, base: lr_batch(config, run),
    "width_transfer": lambda config, run, base: width_transfer(config, run),
    "scaling_ladder": lambda config, run, base: scaling_ladder(config, run),
    "mixture_search": lambda config, run, base: mixture_search(config, run, base.data.sources),
}
"""Studies by ``kind``: (settings, runs points, the run all trials share) -> findings."""


class StudySweeper(Sweeper):
    """Runs a study on the trials of the launcher."""

    def __init__(self, study: Any) -> None:
        """Take ``hydra.sweeper.study``.

        Raises:
            ConfigError: it is none of the studies, or out of range.
        """
        plain = OmegaConf.to_container(study, resolve=True) if OmegaConf.is_config(study) else study
        self.study = build(StudyConfig, {"study": plain}).study

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher, which knows the trials.

        Raises:
            ConfigError: words of the command line are swept, or the launcher has no trials.
        """
        from hydra.core.plugins import Plugins

        if not isinstance(task_function, SweepTask):
            raise TypeError(type(task_function))
        if task_function.swept:
            raise ConfigError(
                f"{' '.join(task_function.swept.values())}: a study chooses its points itself; "
                "give one value, or leave the study out"
            )
        launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(getattr(launcher, "trials", None), Trials):
            raise ConfigError(
                "a study needs trials that are runs of their own; use hydra/launcher=local or slurm"
            )
        self.trials: Trials = launcher.trials
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        tree: Any = OmegaConf.to_container(own, resolve=True)
        self.base = build(RunConfig, tree)

    def sweep(self, arguments: list[str]) -> Any:
        """Train, fit, check; prints what came of it and writes SWEEP/study.json."""
        findings = STUDIES[self.study.kind](self.study, self.trials.run, self.base)
        self._name_parameters()
        findings.write(self.trials.folder / "study.json")
        sys.stdout.write(f"\n{findings.text()}\n\n")
        return None

    def _name_parameters(self) -> None:
        """Say in sweep.json what the trials differ in; no word of the command line does."""
        names = [n for trial in self.trials.record.trials for n in named(trial.overrides)]
        path = self.trials.folder / SWEEP_JSON
        write_json(path, read_json(path) | {"parameters": list(dict.fromkeys(names))})
