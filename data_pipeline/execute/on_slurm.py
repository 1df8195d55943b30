"""Run shard tasks on Slurm: job arrays of workers, submitted with submitit, that share a queue.

An array's elements take task after task from a folder (``OUT/.slurm``), so a phase of a thousand
tasks costs no thousand jobs, and the phases that follow find the workers at work. Slurm is asked
for the state of the jobs every ``poll_s`` seconds and no more. A worker that is gone (killed, out
of memory, node failure, time limit) fails the task it had; three attempts, as everywhere.

    with SlurmExecutor(SlurmConfig(partition="cpu"), Path("OUT/.slurm"), 64) as executor:
        executor.run(tasks, on_result=collect)
"""

import getpass
import logging
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import blake3
import submitit

from data_pipeline.config.execute import SlurmConfig
from data_pipeline.execute.local import ATTEMPTS, Failures, Task, TaskLostError, over_time
from data_pipeline.execute.task_queue import ServeLimits, TaskQueue, serve
from llmtrain.errors import ConfigError

_ENDED = frozenset({
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL",
    "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
})  # fmt: skip
"""States of a job whose worker is gone."""
_PROGRAMS = ("sbatch", "srun", "squeue", "scancel")
_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0
_LARGEST_ARRAY = 1000
"""Elements Slurm allows an array by default."""

logger = logging.getLogger(__name__)


class SlurmExecutor:
    """A driver of workers that are jobs of Slurm."""

    def __init__(
        self, config: SlurmConfig, folder: Path, num_workers: int, time_limit_s: float = 3600.0
    ) -> None:
        """Name the folder of the queue, which every node has to share with the driver."""
        self.config = config
        self.num_workers = num_workers
        self.time_limit_s = time_limit_s
        self.folder = folder.resolve()
        place = blake3.blake3(str(self.folder).encode()).hexdigest(length=6)
        self._prefix = f"llmtrain-{place}-"
        self._name = f"{self._prefix}{uuid.uuid4().hex[:8]}"
        self.queue = TaskQueue(self.folder / self._name)
        self._begun = False
        self._number = 0
        self._live = 0
        self._next_look = 0.0
        self._last_answer = 0.0
        self._barren = 0

    def __enter__(self) -> Self:
        """Check that Slurm is here; nothing is submitted before the first task.

        Raises:
            ConfigError: this machine has no Slurm.
        """
        missing = [name for name in _PROGRAMS if not shutil.which(name)]
        if missing:
            raise ConfigError(
                f"executor=slurm needs {', '.join(missing)} on this machine; run the command on a "
                "login node of the cluster, or use executor=local"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._begun:
            self.queue.stop()
            if error is not None:
                self._cancel(list(self._jobs(self._name) or ()))

    def run(self, tasks: Sequence[Task], on_result: Callable[[Task, Any], None]) -> None:
        """Run every task once with success; larger ones first, ``num_workers`` at a time.

        Raises:
            LLMTrainError: what a task raised because its input is wrong; it is not tried again.
            ConfigError: Slurm refuses the jobs.
            TaskFailedError: a task failed or its worker was gone in every attempt.
        """
        if not tasks:
            return
        self._begin()
        waiting: dict[str, Task] = {}
        for task in sorted(tasks, key=lambda task: -task.cost):
            self._number += 1
            self._offer(waiting, task, f"{self._number:08d}.1")
        try:
            self._collect(waiting, on_result)
        except BaseException:
            self.queue.withdraw()
            raise

    def _collect(self, waiting: dict[str, Task], on_result: Callable[[Task, Any], None]) -> None:
        failures = Failures()
        pause = _SHORTEST_PAUSE
        quiet = time.monotonic() - self._last_answer > self.config.idle_s / 2
        if quiet or min(self.num_workers, len(waiting)) > self._live:
            self._next_look = 0.0
        while waiting:
            pause = min(2 * pause, _LONGEST_PAUSE)
            for name, (kind, value) in self.queue.answers():
                pause, self._last_answer, self._barren = _SHORTEST_PAUSE, time.monotonic(), 0
                task = waiting.pop(name, None)
                if task is None:
                    continue  # of a run that has failed, or of a worker given up for lost
                if kind == "done":
                    on_result(task, value)
                elif kind == "refused":
                    raise value
                else:
                    self._again(waiting, name, task, (kind, value), failures)
            if waiting and time.monotonic() >= self._next_look:
                self._look(waiting, failures)
                self._next_look = time.monotonic() + self.config.poll_s
            elif waiting:
                time.sleep(pause)

    def _offer(self, waiting: dict[str, Task], task: Task, name: str) -> None:
        waiting[name] = task
        self.queue.put(name, task.function, task.arguments)

    def _again(
        self, waiting: dict[str, Task], name: str, task: Task, ended: tuple[str, str],
        failures: Failures,
    ) -> None:  # fmt: skip
        failures.note(task.key, *ended)
        number, _, attempt = name.partition(".")
        self._offer(waiting, task, f"{number}.{int(attempt) + 1}")

    def _begin(self) -> None:
        """Make the queue; end the workers of a driver that died here before."""
        if self._begun:
            return
        self._cancel(list(self._jobs(self._prefix) or ()))
        shutil.rmtree(self.folder, ignore_errors=True)
        self.queue.create()
        self._begun = True

    def _look(self, waiting: dict[str, Task], failures: Failures) -> None:
        """Ask Slurm who is at work; fail the tasks of those who are not, and send for more."""
        jobs = self._jobs(self._name)
        if jobs is None:
            return
        answered = {name for name in waiting if (self.queue.folder / "answers" / name).exists()}
        for name, (owner, since) in self.queue.taken().items():
            lost = jobs.get(owner, "PENDING") == "PENDING"  # gone, or requeued and not yet back
            if name in waiting and name not in answered and lost:
                self.queue.withdraw(name)
                reason = f"its job {owner} is gone (killed, out of memory, or a node failure)"
                if time.time() - since >= self.time_limit_s:
                    reason = over_time(self.time_limit_s)
                self._again(waiting, name, waiting.pop(name), ("lost", reason), failures)
        self._live = len(jobs)
        needed = min(self.num_workers, len(waiting) - len(answered)) - self._live
        if needed > 0:
            self._submit(min(needed, _LARGEST_ARRAY))
        elif set(jobs.values()) == {"PENDING"}:
            logger.info("%d jobs wait in the queue of Slurm", len(jobs))

    def _submit(self, number: int) -> None:
        if self._live == 0:
            self._barren += 1
            if self._barren > ATTEMPTS:
                raise TaskLostError(
                    f"{ATTEMPTS} times the jobs of Slurm ended without an answer; the last said: "
                    f"{self._last_words()}"
                )
        total_s = self.config.hours * 3600
        limits = ServeLimits(
            task_s=self.time_limit_s, idle_s=self.config.idle_s, total_s=total_s,
            folder=os.getcwd(),
        )  # fmt: skip
        executor = submitit.SlurmExecutor(folder=self.queue.folder / "jobs")
        executor.update_parameters(
            job_name=self._name, time=max(1, round(total_s / 60)), array_parallelism=number,
            cpus_per_task=self.config.cpus_per_task, stderr_to_stdout=True,
            additional_parameters=self._options(), wckey=None,
        )  # fmt: skip
        try:
            with executor.batch():
                for _ in range(number):
                    executor.submit(serve_as_job, self.queue.folder, limits)
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            said = str(error).strip().splitlines()[-1]
            raise ConfigError(
                f"Slurm refuses the jobs: {said}; correct slurm.partition={self.config.partition}, "
                f"slurm.account={self.config.account}, slurm.qos={self.config.qos} or slurm.extra"
            ) from None
        self._live += number

    def _options(self) -> dict[str, Any]:
        """Options of sbatch: those of the settings, and what the user adds."""
        config = self.config
        options: dict[str, Any] = {
            "requeue": True, "partition": config.partition, "account": config.account,
            "qos": config.qos,
        }  # fmt: skip
        if config.memory_gib is not None:
            options["mem"] = f"{round(config.memory_gib * 1024)}M"
        named = {name: value for name, value in options.items() if value is not None}
        return {**named, **config.extra}

    def _last_words(self) -> str:
        """The end of the newest log of a job."""
        logs = sorted((self.queue.folder / "jobs").glob("*.out"), key=lambda p: p.stat().st_mtime)
        text = logs[-1].read_text(errors="replace").strip() if logs else ""
        return text[-500:] or "nothing"

    def _jobs(self, name: str) -> dict[str, str] | None:
        """Jobs at work or on their way whose names begin with ``name``: id -> state.

        None where Slurm does not answer: nothing is known then, and nobody is given up.
        """
        command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}",
                   "--format=%i|%T|%j"]  # fmt: skip
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        if found.returncode:
            logger.warning("squeue: %s", found.stderr.strip())
            return None
        rows = (line.strip().split("|", 2) for line in found.stdout.splitlines() if line.strip())
        return {
            job: state for job, state, called in rows if called.startswith(name)
            and state not in _ENDED
        }  # fmt: skip

    def _cancel(self, jobs: Sequence[str]) -> None:
        for start in range(0, len(jobs), _LARGEST_ARRAY):
            command = ["scancel", "--quiet", *jobs[start : start + _LARGEST_ARRAY]]
            subprocess.run(command, check=False, capture_output=True)


def serve_as_job(folder: Path, limits: ServeLimits) -> int:
    """Body of a worker: serve the queue under the name Slurm knows it by.

    Being ended is no checkpoint here: SIGTERM ends the worker, and submitit's warning before the
    time limit is ignored, because no task is taken that may not end in time.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    return serve(folder, submitit.JobEnvironment().job_id, limits)
