"""Run shard tasks on Ray: one remote task per shard task, on a running cluster or one started here.

Ray places the tasks and nothing more: attempts are counted here, as for every executor, and what a
task writes goes to the pipeline's folder, which all nodes have to share. Ray ends the tasks of a
driver that dies; the same command goes on after the last finished one.

    with RayExecutor(RayConfig(address="auto"), num_workers=64) as executor:
        executor.run(tasks, on_result=collect)
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError

from data_pipeline.config.execute import RayConfig
from data_pipeline.execute.local import Failures, Task, answer_within, over_time
from llmtrain.errors import ConfigError

_STORE_BYTES = 100 << 20
"""Object store of a cluster started here: tasks hand over names and counts, never text."""

logger = logging.getLogger(__name__)


class RayExecutor:
    """A driver of remote tasks."""

    def __init__(self, config: RayConfig, num_workers: int, time_limit_s: float = 3600.0) -> None:
        """Keep the settings; the cluster is joined on entry."""
        self.config = config
        self.num_workers = num_workers
        self.time_limit_s = time_limit_s
        self._joined = False

    def __enter__(self) -> Self:
        """Join the cluster, or start one.

        Raises:
            ConfigError: no cluster answers at the address, or a task needs more than there is.
        """
        if ray.is_initialized():
            return self  # the caller's cluster; it is theirs to leave
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "configure_logging": False,
            "include_dashboard": False,
        }
        try:
            if self.config.address is None:
                cores = math.ceil(self.num_workers * self.config.cpus_per_task)
                ray.init("local", num_cpus=cores, object_store_memory=_STORE_BYTES, **quiet)
            else:
                ray.init(self.config.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"ray.address={self.config.address}: no Ray cluster can be used there ({error}); "
                "start one with `ray start --head`, or leave ray.address out to start one here"
            ) from None
        self._joined = True
        self._check_room()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._joined:
            ray.shutdown()
            self._joined = False

    def run(self, tasks: Sequence[Task], on_result: Callable[[Task, Any], None]) -> None:
        """Run every task once with success; larger ones first, ``num_workers`` at a time.

        Raises:
            LLMTrainError: what a task raised because its input is wrong; it is not tried again.
            TaskFailedError: a task failed or its worker died in every attempt.
        """
        waiting = deque(sorted(tasks, key=lambda task: -task.cost))
        running: dict[Any, tuple[Task, float]] = {}
        failures, here = Failures(), os.getcwd()
        submit = self._remote()
        try:
            while waiting or running:
                while waiting and len(running) < self.num_workers:
                    task = waiting.popleft()
                    call = (self.time_limit_s, here, task.function, dict(task.arguments))
                    reference = submit(*call)
                    running[reference] = (task, time.monotonic())
                ready, _ = ray.wait(list(running), num_returns=1)
                for reference in ready:
                    task, started = running.pop(reference)
                    kind, value = self._answer(reference, started)
                    if kind == "done":
                        on_result(task, value)
                    elif kind == "refused":
                        raise value
                    else:
                        failures.note(task.key, kind, value)
                        waiting.appendleft(task)
        finally:
            for reference in running:  # nobody waits for their answers any more
                with suppress(RayError):
                    ray.cancel(reference, force=True)

    def _check_room(self) -> None:
        """Refuse tasks that no machine here has room for; Ray would let them wait for ever."""
        needs = {"CPU": self.config.cpus_per_task, "memory": (self.config.memory_gib or 0) * 2**30}
        listed: Callable[[], list[dict[str, Any]]] = ray.nodes
        nodes = [node["Resources"] for node in listed() if node["Alive"]]
        if any(all(node.get(name, 0) >= needs[name] for name in needs) for node in nodes):
            return
        problem = (
            f"no machine of the Ray cluster has room for a task with ray.cpus_per_task="
            f"{self.config.cpus_per_task:g} and ray.memory_gib={self.config.memory_gib}; the "
            f"largest has {max((node.get('CPU', 0) for node in nodes), default=0):g} cores and "
            f"{max((node.get('memory', 0) for node in nodes), default=0) / 2**30:.1f} GiB"
        )
        if self.config.address is not None:  # it may grow
            logger.warning("%s; tasks wait until one joins", problem)
            return
        ray.shutdown()
        self._joined = False
        raise ConfigError(f"{problem}: ask for less")

    def _remote(self) -> Callable[..., Any]:
        """Return what submits one call; Ray itself repeats nothing."""
        needs: dict[str, Any] = {"num_cpus": self.config.cpus_per_task, "max_retries": 0}
        if self.config.memory_gib is not None:
            needs["memory"] = int(self.config.memory_gib * 2**30)
        submit: Callable[..., Any] = ray.remote(**needs)(answer_within).remote
        return submit

    def _answer(self, reference: Any, started: float) -> tuple[str, Any]:
        try:
            answer: tuple[str, Any] = ray.get(reference)
        except RayError as error:
            first = str(error).strip().splitlines()[0]
            if time.monotonic() - started >= self.time_limit_s:
                return "lost", over_time(self.time_limit_s)
            return "lost", f"its worker died ({type(error).__name__}: {first})"
        return answer
