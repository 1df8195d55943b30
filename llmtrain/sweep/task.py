"""The command of a sweep as Hydra carries it: words every job shares, and how to run one in here.

Hydra gives the function of a job to sweepers and launchers; this one knows its sweep besides.

    task = SweepTask(command=("train", ...), fixed=("experiment=mine",), swept={...}, run=run)
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from llmtrain.run.directory import RunDirectory

if TYPE_CHECKING:
    from llmtrain.sweep.trials import Trials


@dataclass(slots=True)
class SweepTask:
    """One sweep."""

    command: tuple[str, ...]
    """Words after ``llmtrain``, as they were given."""
    fixed: tuple[str, ...]
    """Words that all jobs share, those of ``llmtrain launch`` among them."""
    swept: Mapping[str, str]
    """Name -> word of what the command line sweeps."""
    run: Callable[[Any], int]
    """Runs one job in this process, from its composed configuration; gives its exit status."""
    config_dirs: tuple[Path, ...] = ()
    """Folders with more configuration groups."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES of this process."""
    statuses: list[int] = field(default_factory=list)
    """Exit statuses of the jobs that ran in this process."""
    trials: "Trials | None" = None
    """The trials, where they are processes of their own."""
    held: ExitStack = field(default_factory=ExitStack)
    """What stays open until the sweep ends."""

    def __call__(self, composed: DictConfig) -> int:
        """Run one job in this process."""
        tree = OmegaConf.to_container(composed, resolve=True)
        self.statuses.append(self.run(tree))
        return self.statuses[-1]

    def enter(self, folder: Path) -> None:
        """Keep other processes from the folder of the sweep.

        Raises:
            ConfigError: another process is at work on it.
        """
        self.held.enter_context(RunDirectory(folder).locked())
