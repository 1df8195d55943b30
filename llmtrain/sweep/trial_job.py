"""One trial as a launch: the words all trials share, those of its point, the folder of its run.

trial_job("local", ("experiment=mine",), ["optimizer.lr=1e-3"], Path("runs/lr/trial-000"), ())
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.config.arguments import verbatim
from llmtrain.config.launch import LaunchConfig, split
from llmtrain.config.load import load
from llmtrain.launch.job import Job, make_jobs


@dataclass(frozen=True, slots=True)
class TrialJob:
    """A trial, found right."""

    config: LaunchConfig
    """How it is started."""
    job: Job
    """What is started."""


def trial_job(
    kind: str,
    words: Sequence[str],
    overrides: Sequence[str],
    run: Path,
    config_dirs: Sequence[Path],
) -> TrialJob:
    """Compose a trial; words of ``cluster`` and ``launch`` may be among both.

    Raises:
        ConfigError: everything ``llmtrain launch`` would refuse.
    """
    own, training = split([*words, *overrides])
    place = verbatim([f"runs_dir={run.parent}", f"name={run.name}"], ("runs_dir", "name"))
    config = replace(
        _launch((f"launch={kind}", *own), tuple(config_dirs)),
        overrides=(*training, *place),
        config_dirs=tuple(str(folder.resolve()) for folder in config_dirs),
    )
    (job,) = make_jobs(config)
    return TrialJob(config, job)


@functools.cache
def _launch(words: tuple[str, ...], config_dirs: tuple[Path, ...]) -> LaunchConfig:
    """Trials differ in what they train, seldom in how they are started."""
    return load("launch", words, LaunchConfig, config_dirs)
