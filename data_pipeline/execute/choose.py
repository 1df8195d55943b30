"""Executors by name: where ``executor=`` of a run sends its tasks.

All of them run the same functions on the same shards and leave the same bytes; they differ in who
starts the processes. Ray and submitit are imported only where they are asked for.

    with open_executor(config) as executor:
        run_pipeline(config, Context(out=Path(config.out), executor=executor))
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from data_pipeline.config.run import RunConfig
from data_pipeline.execute.local import Executor, LocalExecutor


def _local(config: RunConfig) -> AbstractContextManager[Executor]:
    return LocalExecutor(config.num_workers, config.time_limit_s)


def _ray(config: RunConfig) -> AbstractContextManager[Executor]:
    from data_pipeline.execute.on_ray import RayExecutor

    return RayExecutor(config.ray, config.num_workers, config.time_limit_s)


def _slurm(config: RunConfig) -> AbstractContextManager[Executor]:
    from data_pipeline.execute.on_slurm import SlurmExecutor

    queue = Path(config.out) / ".slurm"
    return SlurmExecutor(config.slurm, queue, config.num_workers, config.time_limit_s)


EXECUTORS: dict[str, Callable[[RunConfig], AbstractContextManager[Executor]]] = {
    "local": _local,
    "ray": _ray,
    "slurm": _slurm,
}
"""Value of ``executor`` -> what makes it."""


def open_executor(config: RunConfig) -> AbstractContextManager[Executor]:
    """Return the executor of a configuration, to be used in a ``with`` statement.

    Raises:
        ModuleNotFoundError: its package is not installed; ``refusal`` names the pip command.
    """
    return EXECUTORS[config.executor](config)
