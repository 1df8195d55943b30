"""A training command line that was found right for the ranks it will have.

Invariant: whatever ``llmtrain train`` would refuse for its settings or for the number of ranks is
refused here, before any process starts; the words themselves go on as they were written. No torch
is imported.

    (job,) = make_jobs(config)    # several where launch.array has several tasks
"""

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmtrain.config.launch import KubernetesLaunch, Launch, LaunchConfig, SlurmLaunch
from llmtrain.config.load import config_hash, load
from llmtrain.config.parallel import implied_world_size
from llmtrain.config.run import RunConfig, broken_rules
from llmtrain.doctor import gpus
from llmtrain.errors import ConfigError
from llmtrain.prepare import problems_here, resolve

_COUNT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run, ready to be started."""

    words: tuple[str, ...]
    """Words after ``llmtrain train``, the name of the run among them."""
    config: RunConfig
    """What they come to here, paths made absolute."""
    hash: str
    """Hash of what they come to before paths are made absolute: the same on every node."""
    ranks: tuple[int, ...]
    """Ranks on each node."""
    gpus: int
    """GPUs on each node; 0 where there are none."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return sum(self.ranks)

    @property
    def run(self) -> Path:
        """Folder of the run, absolute."""
        return Path(self.config.runs_dir).absolute() / str(self.config.name)

    @property
    def label(self) -> str:
        """Name of the run as Kubernetes takes it: a letter, then small letters, digits, dashes."""
        kept = re.sub("[^a-z0-9]+", "-", str(self.config.name).lower())
        return (kept if kept[0].isalpha() else f"run-{kept.lstrip('-')}")[:40].strip("-")

    @property
    def gpus_used(self) -> tuple[int, ...]:
        """GPUs that the ranks of each node need: one for each of them, where they train on GPUs."""
        if not self.gpus or self.config.engine.device == "cpu":
            return (0,) * len(self.ranks)
        return self.ranks


def make_jobs(config: LaunchConfig, ranks: Sequence[int] | None = None) -> list[Job]:
    """Compose the training run, or that of every task of an array, and look for what is wrong.

    Args:
        config: the launch.
        ranks: ranks on each node where something else than ``cluster`` says so.

    Raises:
        ConfigError: every problem found; those of a task of an array behind the task's words.
    """
    num_gpus = _gpus(config)
    launch = config.launch
    entries = launch.array if isinstance(launch, SlurmLaunch) else ()
    jobs, problems = list[Job](), list[str]()
    for entry in entries or ("",):
        head = f"launch.array, {entry}: " if entries else ""
        try:
            job = _job(config, tuple(entry.split()), ranks, num_gpus)
        except ConfigError as error:
            problems += [head + problem for problem in error.problems]
            continue
        problems += [head + problem for problem in _problems(config, job)]
        if any(other.run == job.run for other in jobs):
            problems.append(f"{head}the same run as another task; leave one out")
        jobs.append(job)
    if problems:
        raise ConfigError(problems)
    return jobs


def _compose(config: LaunchConfig, more: Sequence[str]) -> RunConfig:
    """The training configuration as its command line has it."""
    folders = [Path(folder) for folder in config.config_dirs]
    return load("train", [*config.overrides, *more], RunConfig, folders)


def _job(
    config: LaunchConfig, entry: tuple[str, ...], ranks: Sequence[int] | None, num_gpus: int
) -> Job:
    """A job whose words name its run, so that every node and whoever waits knows the folder."""
    training = _compose(config, entry)
    name = str(resolve(training).name)
    if entry:
        name = f"{training.name or 'array'}-{config_hash(training)}"
    words = (*(f"--config-dir={folder}" for folder in config.config_dirs), *config.overrides,
             *entry)  # fmt: skip
    grace_s = _grace_s(config.launch)
    if grace_s and not any(word.lstrip("+").startswith("checkpoint.grace_s=") for word in words):
        words = (*words, f"checkpoint.grace_s={grace_s}")
        held = replace(training.checkpoint, grace_s=float(grace_s))
        training = replace(training, checkpoint=held)
    if training.name != name:
        words = (*words, f"name={name}")
        training = replace(training, name=name)
    return Job(
        words=words,
        config=resolve(training),
        hash=config_hash(training),
        ranks=tuple(ranks) if ranks is not None else _ranks(config, training, num_gpus),
        gpus=num_gpus,
    )


def _grace_s(launch: Launch) -> int:
    """Seconds a run has after it is asked to stop; 0 where the launch does not say."""
    if isinstance(launch, SlurmLaunch):
        return launch.signal_s
    return launch.grace_s if isinstance(launch, KubernetesLaunch) else 0


def _problems(config: LaunchConfig, job: Job) -> list[str]:
    """What is wrong with a job: on other machines, what can be said without their disks."""
    if config.launch.kind in ("kubernetes", "skypilot"):
        return broken_rules(job.config, job.world_size)
    problems = problems_here(job.config, job.world_size)
    launch = config.launch
    if isinstance(launch, SlurmLaunch) and launch.min_nodes is not None:
        for num_nodes in range(launch.min_nodes, len(job.ranks)):
            broken = broken_rules(job.config, sum(job.ranks[:num_nodes]))
            problems += [f"launch.min_nodes, on {num_nodes} nodes: {one}" for one in broken]
    return problems


def _gpus(config: LaunchConfig) -> int:
    """GPUs of each node."""
    asked = config.cluster.gpus_per_node
    if asked != "auto":
        return asked
    if config.launch.kind in ("slurm", "kubernetes", "skypilot"):
        raise ConfigError(
            "cluster.gpus_per_node=auto counts the GPUs of this machine, target="
            f"{config.launch.kind} runs on others; set cluster.gpus_per_node=8, or choose "
            "cluster=infiniband, ethernet, efa or cpu"
        )
    try:
        return len(gpus.listed(_COUNT_S))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"the GPUs of this machine cannot be counted ({error}); set cluster.gpus_per_node=N"
        ) from error


def _ranks(config: LaunchConfig, training: RunConfig, num_gpus: int) -> tuple[int, ...]:
    """Ranks on each node."""
    nodes, asked = config.cluster.num_nodes, config.cluster.ranks_per_node
    if asked != "auto":
        return (asked,) * nodes
    if num_gpus and training.engine.device != "cpu":
        return (num_gpus,) * nodes
    return (math.ceil(implied_world_size(training.parallel) / nodes),) * nodes


def interpreter(config: LaunchConfig) -> str:
    """The Python that runs on the nodes."""
    if config.cluster.python is not None:
        return config.cluster.python
    return "python" if config.launch.kind in ("kubernetes", "skypilot") else sys.executable


def torchrun(config: LaunchConfig, job: Job, meeting: Sequence[str], ranks: int | str) -> list[str]:
    """The command of one node: torchrun with where the nodes meet, then the training command."""
    start = [interpreter(config), "-m", "torch.distributed.run", *meeting]
    return [*start, f"--nproc-per-node={ranks}", "-m", "llmtrain", "train", *job.words]
