"""``--multirun``: Hydra composes and chooses the points, trials run them, a table ends it.

Invariant: nothing of Optuna, submitit or Hydra's plugins is imported before the command line names
it; Hydra's own sweepers and launchers work as they do elsewhere.

    status = multirun("train", task, overrides)
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.arguments import verbatim
from llmtrain.config.launch import OWN, VERBATIM
from llmtrain.config.load import config_root, sweep_overrides
from llmtrain.errors import ConfigError
from llmtrain.sweep.plugins import register
from llmtrain.sweep.task import SweepTask
from llmtrain.sweep.trials import SweepStopped, Trials

logger = logging.getLogger(__name__)

QUIET = ("hydra/job_logging=none", "hydra/hydra_logging=none")
_ELSEWHERE = ("target", "dry_run")


def sort_out(overrides: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str], list[str]]:
    """Words all jobs share, swept words by name, words for Hydra.

    Raises:
        ConfigError: a word of ``llmtrain launch`` that a sweep has no use for.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    fixed, swept, for_hydra = list[str](), dict[str, str](), list[str]()
    for word in verbatim(overrides, VERBATIM):
        key = word.lstrip("+~").partition("=")[0]
        if key in (*_ELSEWHERE, "launch"):
            raise ConfigError(
                f"{word}: the trials of a sweep run where hydra/launcher=local or "
                "hydra/launcher=slurm says; leave it out"
            )
        try:
            many = parser.parse_override(word).is_sweep_override()
        except HydraException:
            many = False  # said below, with the other problems
        own = key.partition(".")[0] in OWN
        if many:
            swept[key] = word
        elif not key.startswith("hydra"):
            fixed.append(word)
        if many or not own:
            for_hydra.append(word)
    return tuple(fixed), swept, for_hydra


def multirun(root: str, task: SweepTask, for_hydra: Sequence[str]) -> int:
    """Run a sweep; gives its exit status, the worst of its jobs.

    Raises:
        ConfigError: what is wrong with the words, the sweep's folder, or every point.
    """
    with task.held:
        try:
            _sweep(root, task, sweep_overrides(root, for_hydra, task.config_dirs))
        except SweepStopped as stopped:
            again = shlex.join(["llmtrain", *task.command])
            logger.info("stopped; the same command goes on: %s", again)
            return stopped.status
        if task.trials is None:
            return max(task.statuses, default=0)
        return _told(task.trials)


def _sweep(root: str, task: SweepTask, overrides: Sequence[str]) -> None:
    """Let Hydra compose, make sweeper and launcher, and sweep."""
    from hydra import version
    from hydra._internal.callbacks import Callbacks
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from hydra.types import HydraContext, RunMode
    from omegaconf.errors import OmegaConfBaseException

    version.setbase("1.3")  # jobs of Hydra's launchers stay in this folder
    hydra = Hydra("llmtrain", ConfigLoaderImpl(create_config_search_path(str(config_root()))))
    words = [*QUIET, *overrides]
    if task.config_dirs:
        paths = ",".join(f"'file://{folder.resolve()}'" for folder in task.config_dirs)
        words.append(f"hydra.searchpath=[{paths}]")

    if root == "train" and not any(word.startswith("hydra/launcher=") for word in words):
        words.append("hydra/launcher=local")
    if root == "train" and any(word == "hydra/launcher=joblib" for word in words):
        raise ConfigError(
            "hydra/launcher=joblib would train in processes that see all GPUs, save nothing when "
            "they are stopped and cannot go on; use hydra/launcher=local hydra.launcher.jobs=N"
        )
    try:
        config = hydra.compose_config(root, words, RunMode.MULTIRUN)
        for plugin in (config.hydra.launcher, config.hydra.sweeper):
            register(str(plugin["_target_"]))
        context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config))
        sweeper = Plugins.instance().instantiate_sweeper(
            hydra_context=context, task_function=task, config=config
        )
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, ConfigError):  # of a sweeper's or launcher's own fields
            raise error.__cause__ from None
        raise ConfigError(" ".join(str(error).split())) from error
    if task.trials is not None:
        # Trials are looked at before they start; Hydra would compose each of them once more.
        sweeper.validate_batch_is_legal = lambda batch: None  # type: ignore[method-assign]
    sweeper.sweep(arguments=list(config.hydra.overrides.task))


def _told(trials: Trials) -> int:
    """Print the table of the trials; gives 0, or the status of the worst."""
    from llmtrain.sweep.table import table

    found = trials.record.trials
    folder = trials.folder
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    sys.stdout.write(f"{table(found, trials.objective)}\n\nllmtrain report run={folder}\n")
    failed = sum(trial.state == "failed" for trial in found)
    if failed:
        logger.warning("%d of %d trials failed", failed, len(found))
    return int(failed > 0)
