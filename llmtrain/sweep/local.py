"""Trials on this machine: each a process of its own, or torchrun, on devices nobody else has.

Invariant: trials at work share neither a GPU nor, without GPUs, a core; a sweep that is gone,
however it went, takes its trials with it: they save and stop.

    launch = LocalTrials(words=("experiment=mine", "cluster.gpus_per_node=2"), jobs=4)
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llmtrain.config.launch import LaunchConfig, split
from llmtrain.config.load import load
from llmtrain.doctor import gpus
from llmtrain.errors import ConfigError
from llmtrain.launch.machines import alone, setting
from llmtrain.run.directory import RunDirectory
from llmtrain.sweep.trial_job import TrialJob, trial_job

logger = logging.getLogger(__name__)

_COUNT_S = 20.0


@dataclass(slots=True)
class LocalTrials:
    """Starts trials on this machine."""

    words: tuple[str, ...] = ()
    """What all trials share, as ``llmtrain launch`` takes it."""
    config_dirs: tuple[Path, ...] = ()
    """Folders with more configuration groups."""
    jobs: int | None = None
    """Trials at a time; None is as many as have ``cluster.gpus_per_node``, else one."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES of this process."""
    _all: list[str] = field(init=False)
    _free: list[str] = field(init=False)
    _cores: list[tuple[int, ...]] = field(init=False)
    _at_work: int = field(init=False, default=0)
    _waits: set[Path] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        """Share out the devices of this machine.

        Raises:
            ConfigError: more trials at a time than there are GPUs.
        """
        own, _ = split(list(self.words))
        cluster = load("launch", ["launch=local", *own], LaunchConfig, self.config_dirs).cluster
        asked = cluster.gpus_per_node
        self._all = [] if asked == 0 else self._devices()
        self._free = list(self._all)
        if asked == "auto":
            share = len(self._all) // (self.jobs or 1)
            if self._all and not share:
                raise ConfigError(
                    f"hydra.launcher.jobs={self.jobs} trials at a time, this machine has "
                    f"{len(self._all)} GPUs; use at most {len(self._all)}"
                )
            self.words = (*self.words, f"cluster.gpus_per_node={share}")
        elif self.jobs is None and asked:
            self.jobs = max(1, len(self._all) // asked)
        pinned = hasattr(os, "sched_getaffinity") and not self._all
        self._cores = shares(sorted(os.sched_getaffinity(0)), self.size) if pinned else []

    @property
    def size(self) -> int:
        """Trials at a time."""
        return self.jobs or 1

    def job(self, overrides: Sequence[str], folder: Path) -> TrialJob:
        """The run of a trial, found right."""
        trial = trial_job("local", self.words, overrides, folder, self.config_dirs)
        need, there = trial.job.gpus_used[0], len(self._all)
        if need > there:
            raise ConfigError(
                f"the trial takes {need} GPUs, this machine has {there}; set cluster.gpus_per_node"
            )
        return trial

    def start(self, trial: TrialJob) -> "_Process | None":
        """Start a trial where there is room and nobody is still saving its run."""
        job, need = trial.job, trial.job.gpus_used[0]
        if self._at_work >= self.size or need > len(self._free) or self._held(job.run):
            return None
        run = RunDirectory(job.run)
        run.logs.mkdir(parents=True, exist_ok=True)
        run.clear_status()
        devices = [self._free.pop(0) for _ in range(need)]
        cores = self._cores.pop(0) if self._cores else ()
        pinned = ["env", f"CUDA_VISIBLE_DEVICES={','.join(devices)}"] if devices else []
        with (run.logs / "console.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "llmtrain.launch.supervise", f"run={job.run}", "tied=true",
                 "--", *pinned, *setting(trial.config.cluster.environment),
                 *alone(trial.config, job)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
            )  # fmt: skip
        self._at_work += 1
        return _Process(self, process, devices, cores)

    def give_back(self, devices: Sequence[str], cores: tuple[int, ...]) -> None:
        """Take the devices of a trial that has ended."""
        self._at_work -= 1
        self._free = sorted([*self._free, *devices], key=self._all.index)
        if cores:
            self._cores.append(cores)

    def _devices(self) -> list[str]:
        """The GPUs this process may use, by the names CUDA takes."""
        if self.visible is not None:
            return [name for name in self.visible.split(",") if name]
        try:
            return [str(gpu.index) for gpu in gpus.listed(_COUNT_S)]
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            raise ConfigError(
                f"the GPUs of this machine cannot be counted ({error}); set CUDA_VISIBLE_DEVICES, "
                "empty for none"
            ) from error

    def _held(self, folder: Path) -> bool:
        """Whether the process of an earlier sweep is still at work on a run."""
        if not folder.is_dir():
            return False
        try:
            with RunDirectory(folder).locked():
                return False
        except ConfigError as error:
            if folder not in self._waits:
                logger.info("%s", error)
                self._waits.add(folder)
            return True


@dataclass(slots=True)
class _Process:
    """A trial at work: a supervisor with its ranks below."""

    owner: LocalTrials
    process: "subprocess.Popen[bytes]"
    devices: Sequence[str]
    cores: tuple[int, ...]

    def ended(self) -> int | None:
        """Exit status of the run, None while it is at work."""
        status = self.process.poll()
        if status is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.stdin = None
            self.owner.give_back(self.devices, self.cores)
        return status

    def ask(self, interrupts: int) -> None:
        """Ctrl-C for the supervisor: the first saves, the second and third end the trial."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)


def shares(cores: Sequence[int], number: int) -> list[tuple[int, ...]]:
    """Cores in ``number`` equal parts; none where there are too few to give each one."""
    each = len(cores) // number
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(number)] if each else []
