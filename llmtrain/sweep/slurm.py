"""Trials as jobs of Slurm, submitted through submitit: one task per node, in it the node's ranks.

Invariant: a job goes by a name made from its run folder, so that a sweep that was killed finds its
jobs again, and no run has two. The batch script looks at every node and starts ranks exactly as
that of ``llmtrain launch`` does; submitit queues the job again where it was asked to stop.

    launch = SlurmTrials(words=("cluster=cpu", "launch.time_limit=60", ...), jobs=4)
"""

import getpass
import importlib.util
import logging
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3

from llmtrain.config.launch import SlurmLaunch
from llmtrain.errors import ConfigError
from llmtrain.launch.slurm import prologue
from llmtrain.run.directory import RunDirectory
from llmtrain.sweep.trial_job import TrialJob, trial_job
from llmtrain.sweep.trials import ended_code

logger = logging.getLogger(__name__)

_PROGRAMS = ("sbatch", "srun", "squeue", "scancel")
_ANY_NUMBER = 1_000_000
"""Times a job may be queued again; that every start comes further is what ends it."""


@dataclass(slots=True)
class SlurmTrials:
    """Submits trials to Slurm."""

    words: tuple[str, ...] = ()
    """What all trials share, as ``llmtrain launch`` takes it."""
    config_dirs: tuple[Path, ...] = ()
    """Folders with more configuration groups."""
    jobs: int = 4
    """Jobs at a time, those that wait in the queue among them."""
    poll_s: float = 10.0
    """Seconds between two questions to Slurm."""
    _at_work: set[str] = field(init=False, default_factory=set)
    _queue: dict[str, tuple[str, str]] | None = field(init=False, default=None)
    _asked: float = field(init=False, default=float("-inf"))

    def __post_init__(self) -> None:
        """See that Slurm and submitit are here.

        Raises:
            ConfigError: what is missing.
        """
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError(
                "hydra/launcher=slurm needs submitit, which is not installed; run "
                "pip install 'llmtrain[sweep]'"
            )
        if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
            raise ConfigError(
                f"hydra/launcher=slurm needs {', '.join(missing)} on this machine; start the sweep "
                "on a login node of the cluster, or use hydra/launcher=local"
            )

    @property
    def size(self) -> int:
        """Trials at a time."""
        return self.jobs

    def job(self, overrides: Sequence[str], folder: Path) -> TrialJob:
        """The run of a trial, found right."""
        trial = trial_job("slurm", self.words, overrides, folder, self.config_dirs)
        launch = _launch(trial)
        if launch.groups or launch.array or launch.wait or launch.template is not None:
            raise ConfigError(
                "launch.groups, array, wait and template are not for the trials of a sweep; leave "
                "them out"
            )
        if launch.time_limit is None:
            raise ConfigError(
                "launch.time_limit is not set: submitit asks for a limit with every job; set "
                "launch.time_limit=MINUTES, a trial that is longer is queued again and goes on"
            )
        return trial

    def start(self, trial: TrialJob) -> "_Job | None":
        """Submit a trial where there is room; one whose job is there already is watched.

        None also where Slurm does not answer: the job may be there.
        """
        name = job_name(trial.job.run)
        if len(self._at_work) >= self.jobs:
            return None
        if self._queue is not None:
            self._forget()
        if not self.answered():
            return None
        if self.found(name) is None and ended_code(trial.job.run) != 0:
            submit(trial, name)
            self._forget()  # the answer before does not know it
        self._at_work.add(name)
        return _Job(self, name, trial.job.run)

    def answered(self) -> bool:
        """Whether Slurm has said what is queued since the last submission."""
        if time.monotonic() - self._asked >= self.poll_s:
            self._asked = time.monotonic()
            if (queue := _queue()) is not None:
                self._queue = queue
        return self._queue is not None

    def found(self, name: str) -> tuple[str, str] | None:
        """Number and state of a job that waits or runs; None too where Slurm has not answered."""
        return self._queue.get(name) if self.answered() and self._queue is not None else None

    def _forget(self) -> None:
        self._queue, self._asked = None, float("-inf")

    def left(self, name: str) -> None:
        """Make room for another job."""
        self._at_work.discard(name)


@dataclass(slots=True)
class _Job:
    """A trial in Slurm's hands."""

    owner: SlurmTrials
    name: str
    run: Path

    def ended(self) -> int | None:
        """Status 2 where the nodes found the words wrong, else 1: the run itself says more."""
        if not self.owner.answered() or self.owner.found(self.name) is not None:
            return None
        self.owner.left(self.name)
        return 2 if _refused(self.run).exists() else 1

    def ask(self, interrupts: int) -> None:
        """The first request saves; one that waits, or is asked twice, leaves the queue."""
        found = self.owner.found(self.name)
        if found is None:
            return
        number, state = found
        gentle = interrupts < 2 and state != "PENDING"
        command = ["scancel", "--quiet", *(["--signal=USR1"] if gentle else []), number]
        subprocess.run(command, check=False, capture_output=True)


def submit(trial: TrialJob, name: str) -> None:
    """Hand a trial to Slurm.

    Raises:
        ConfigError: Slurm does not take it.
    """
    import submitit

    from llmtrain.sweep.on_nodes import OnNodes

    job, launch, cluster = trial.job, _launch(trial), trial.config.cluster
    run = RunDirectory(job.run)
    run.clear_status()
    folder = job.run / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    _refused(job.run).unlink(missing_ok=True)
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=_ANY_NUMBER)
    shared: dict[str, Any] = {
        "partition": launch.partition, "account": launch.account, "qos": launch.qos,
        "constraint": launch.constraint, "exclude": launch.exclude, "nodelist": launch.nodelist,
        "gpus_per_node": max(job.gpus_used) or None, "cpus_per_task": cluster.cpus_per_node,
        "mem": None if cluster.memory_gib is None else f"{cluster.memory_gib}G",
        "exclusive": launch.exclusive or None,
    }  # fmt: skip
    further = {"requeue": launch.requeue or None, **launch.options}
    executor.update_parameters(
        job_name=name, time=minutes(str(launch.time_limit)), nodes=len(job.ranks),
        ntasks_per_node=1, signal_delay_s=launch.signal_s, stderr_to_stdout=True, wckey=None,
        setup=prologue(trial.config, launch, job, _refused(job.run)).splitlines(),
        srun_args=["--cpu-bind=none"],
        additional_parameters={key: value for key, value in further.items() if value is not None},
        **{key: value for key, value in shared.items() if value is not None},
    )  # fmt: skip
    body = OnNodes(str(job.run), job.ranks[0], job.words, alone=job.world_size == 1,
                   requeue=launch.requeue)  # fmt: skip
    try:
        number = executor.submit(body).job_id
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        said = str(error).strip().splitlines()[-1]
        raise ConfigError(f"Slurm does not take {job.run.name}: {said}; correct launch.*") from None
    logger.info("%s is job %s, its output in %s", job.run.name, number, folder)


def job_name(run: Path) -> str:
    """Name of the job of a run: no other folder has the same."""
    place = blake3.blake3(str(run).encode()).hexdigest(length=4)
    return f"{run.parent.name}-{run.name}-{place}"


def minutes(limit: str) -> int:
    """A time of Slurm (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in minutes, rounded up."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, seconds = (*parts, 0, 0)[:3]
    else:
        hours, mins, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return max(1, (int(days or 0) * 24 + hours) * 60 + mins + -(-seconds // 60))


def _launch(trial: TrialJob) -> SlurmLaunch:
    if not isinstance(trial.config.launch, SlurmLaunch):
        raise TypeError(trial.config.launch.kind)
    return trial.config.launch


def _refused(run: Path) -> Path:
    """Written by the batch script where a node finds the words wrong."""
    return run / "launch" / "refused"


def _queue() -> dict[str, tuple[str, str]] | None:
    """Jobs of this user that wait or run, by name: (number, state); None without an answer."""
    command = ["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A|%T|%j"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    if answer.returncode:
        logger.warning("squeue: %s", answer.stderr.strip())
        return None
    rows = (line.strip().split("|", 2) for line in answer.stdout.splitlines() if line.strip())
    return {name: (number, state) for number, state, name in rows}
