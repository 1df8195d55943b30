"""A run as it lies in its folder: what it was trained with, and one of its checkpoints.

found = find_run("runs/demo", step=None)
found.config.model, found.checkpoint.path
"""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.checkpoint import archive
from llmtrain.config.load import build, from_yaml
from llmtrain.config.run import RunConfig
from llmtrain.errors import CheckpointError
from llmtrain.run.directory import RunDirectory


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run folder and the checkpoint that was asked for, whose checksums hold."""

    directory: RunDirectory
    """The run folder."""
    config: RunConfig
    """What the run was trained with: its ``config.yaml``."""
    checkpoint: archive.Checkpoint
    """The checkpoint."""


def find_run(run: str, step: int | None = None) -> StoredRun:
    """Open the newest good checkpoint of a run folder, or that of ``step``.

    Raises:
        CheckpointError: there is no run, or no such checkpoint.
    """
    directory = RunDirectory(Path(run))
    if not directory.config_yaml.is_file():
        raise CheckpointError(
            f"{run} is not a run folder: it has no config.yaml; give the folder that "
            "`llmtrain train` made, such as runs/NAME"
        )
    config = build(RunConfig, from_yaml(directory.config_yaml.read_text(encoding="utf-8")))
    where = directory.path
    if step is not None:
        where = directory.checkpoints / archive.folder_name(step)
        if not where.is_dir():
            steps = ", ".join(str(s) for s, _ in archive.scan(directory.checkpoints)) or "none"
            raise CheckpointError(f"{run} holds no checkpoint of step {step}; it holds {steps}")
    return StoredRun(directory, config, archive.locate(where))
