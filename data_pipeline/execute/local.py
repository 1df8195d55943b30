"""Run shard tasks on worker processes that may die at any time.

The supervisor owns one pipe per worker. A worker that is killed, or that takes longer than the time
limit, is replaced, and its task is tried again elsewhere: three attempts, then the run stops with
what the last one said. The limit counts from when the worker says that it has the task: starting a
process and importing what the task needs have a limit of their own. Workers die with the driver,
however it dies. Results arrive in any order; nothing a task writes may depend on which worker ran
it or when.

    with LocalExecutor(num_workers=2) as executor:
        executor.run([Task("a", work, {"x": 1})], on_result=collect)
"""

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

from data_pipeline.execute.worker_memory import IDLE_BYTES, give_back, own_bytes, settle_in
from data_pipeline.refusal import refusal
from llmtrain.errors import DataError, LLMTrainError

ATTEMPTS = 3
"""How often one task is tried."""
_CLOSE_SECONDS = 5.0
_START_SECONDS = 300.0
"""How long a worker may take from being given a task to having imported it."""
_PRELOAD = ["data_pipeline.execute.preload"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """One call of a module-level function; its arguments and result are pickled."""

    key: str
    """Name, unique within one ``run``."""
    function: Callable[..., Any]
    """What to call."""
    arguments: Mapping[str, Any]
    """Keyword arguments."""
    cost: int = 0
    """Size of the work, bytes of input where they are known; larger tasks start first."""


class Executor(Protocol):
    """Something that runs tasks."""

    def run(self, tasks: Sequence[Task], on_result: Callable[[Task, Any], None]) -> None:
        """Run every task once with success, calling ``on_result`` in the driver for each."""
        ...


class TaskFailedError(RuntimeError):
    """A task failed in every attempt."""


class TaskLostError(TaskFailedError, LLMTrainError):
    """What ended a task in its last attempt was its time limit or the end of its worker."""


@dataclass
class Failures:
    """Counts how often each task has failed."""

    attempts: int = ATTEMPTS
    """How often one task is tried."""
    _reasons: dict[str, list[str]] = field(default_factory=dict)

    def note(self, key: str, kind: str, reason: str) -> None:
        """Note that an attempt has ``failed`` by itself, or was ``lost``.

        Raises:
            TaskFailedError: it was the last one.
        """
        reasons = self._reasons.setdefault(key, [])
        reasons.append(reason)
        logger.warning("%s: attempt %d failed: %s", key, len(reasons), _last_line(reason))
        if len(reasons) >= self.attempts:
            error = TaskLostError if kind == "lost" else TaskFailedError
            raise error(f"{key} failed {len(reasons)} times; the last time: {reason}")


def over_time(time_limit_s: float) -> str:
    """Return what is said of an attempt that took too long."""
    return f"took longer than its time limit of {time_limit_s:g} s; raise time_limit_s"


class InlineExecutor:
    """Runs tasks one after another in this process: for a debugger, and for tests of stages."""

    def run(self, tasks: Sequence[Task], on_result: Callable[[Task, Any], None]) -> None:
        """Run the tasks in order."""
        for task in tasks:
            on_result(task, task.function(**task.arguments))


@dataclass
class _Worker:
    """A live process, its pipe, and what it is doing."""

    process: Any
    pipe: Connection
    lifeline: Connection
    task: Task | None = None
    taken: bool = False
    """Whether the worker has said that it has begun ``task``."""
    deadline: float = 0.0


@dataclass
class LocalExecutor:
    """A supervisor over worker processes on this machine."""

    num_workers: int
    """Processes that run tasks at the same time."""
    time_limit_s: float = 3600.0
    """Seconds one attempt may take, once begun, before its worker is killed."""
    attempts: int = ATTEMPTS
    """How often one task is tried."""
    _workers: list[_Worker] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            if worker.task is None and error is None:
                _send(worker, None)
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(_CLOSE_SECONDS)
            _discard(worker)
        self._workers.clear()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [w.process.pid for w in self._workers if w.process.is_alive()]

    def run(self, tasks: Sequence[Task], on_result: Callable[[Task, Any], None]) -> None:
        """Run every task once with success; larger ones first.

        Raises:
            LLMTrainError: what a task raised because its input is wrong; it is not tried again.
            TaskFailedError: a task failed or its worker died in every attempt.
        """
        for worker in [w for w in self._workers if own_bytes(w.process.pid) > IDLE_BYTES]:
            self._remove(worker)  # a new one is cheap and holds nothing of the last phase
        try:
            self._run(deque(sorted(tasks, key=lambda task: -task.cost)), on_result)
        except BaseException:
            for worker in [w for w in self._workers if w.task is not None]:
                self._remove(worker)  # nobody waits for its answer any more
            raise

    def _run(self, waiting: deque[Task], on_result: Callable[[Task, Any], None]) -> None:
        failures = Failures(self.attempts)
        unfinished = len(waiting)
        self._dispatch(waiting)
        while unfinished:
            done: list[tuple[Task, Any]] = []
            try:
                for worker in self._ready():
                    task = worker.task
                    kind, value = self._receive(worker)
                    if task is None or kind == "taken":
                        continue
                    if kind == "done":
                        done.append((task, value))
                    elif kind == "refused":
                        raise value
                    else:
                        failures.note(task.key, kind, value)
                        waiting.appendleft(task)
                self._dispatch(waiting)  # nobody waits while the driver is busy with results
            finally:  # what is done counts, whatever else came with it
                for task, value in done:
                    unfinished -= 1
                    on_result(task, value)

    def _dispatch(self, waiting: deque[Task]) -> None:
        """Give every idle worker a task, starting workers while there is work for more."""
        idle = [w for w in self._workers if w.task is None]
        while waiting and (idle or len(self._workers) < self.num_workers):
            worker = idle.pop() if idle else self._start()
            worker.task, worker.taken = waiting.popleft(), False
            worker.deadline = time.monotonic() + _START_SECONDS
            _send(worker, (worker.task.function, dict(worker.task.arguments)))

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        pipe, worker_pipe = context.Pipe()
        lifeline_end, lifeline = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(worker_pipe, lifeline_end), daemon=True)
        process.start()
        worker_pipe.close()
        lifeline_end.close()
        worker = _Worker(process, pipe, lifeline)
        self._workers.append(worker)
        return worker

    def _ready(self) -> list[_Worker]:
        """Wait until a worker answers, dies or runs out of time; return those."""
        nearest = min((w.deadline for w in self._workers if w.task), default=time.monotonic())
        handles: dict[Any, _Worker] = {w.pipe: w for w in self._workers}
        handles.update({w.process.sentinel: w for w in self._workers})
        answered = wait(list(handles), max(0.0, nearest - time.monotonic()))
        ready = {id(handles[h]): handles[h] for h in answered}
        now = time.monotonic()
        ready.update({id(w): w for w in self._workers if w.task and w.deadline <= now})
        return list(ready.values())

    def _receive(self, worker: _Worker) -> tuple[str, Any]:
        """Take a worker's answer; a worker without one is dead or late, and is removed."""
        try:
            if worker.pipe.poll():
                answer: tuple[str, Any] = worker.pipe.recv()
                if answer[0] == "taken":
                    worker.taken = True
                    worker.deadline = time.monotonic() + self.time_limit_s
                else:
                    worker.task = None
                return answer
        except (EOFError, OSError):
            pass
        late = worker.process.is_alive() and worker.deadline <= time.monotonic()
        code = self._remove(worker)
        if late and not worker.taken:
            return "lost", f"no worker began it within {_START_SECONDS:g} s; use fewer workers"
        if late:
            return "lost", over_time(self.time_limit_s)
        killed = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
        hint = " (out of memory? use fewer workers)" if code == -signal.SIGKILL else ""
        return "lost", f"worker died with {killed}{hint}"

    def _remove(self, worker: _Worker) -> int | None:
        """Kill a worker and forget it; returns the exit status of its process."""
        worker.process.kill()
        worker.process.join()
        code: int | None = worker.process.exitcode
        self._workers.remove(worker)
        _discard(worker)
        return code


def _send(worker: _Worker, message: object) -> None:
    try:
        worker.pipe.send(message)
    except OSError:
        logger.debug("worker %s is gone", worker.process.pid)  # its sentinel tells the supervisor


def _discard(worker: _Worker) -> None:
    worker.pipe.close()
    worker.lifeline.close()
    if not worker.process.is_alive():
        worker.process.close()


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"


def _work(pipe: Connection, lifeline: Connection) -> None:
    """Body of a worker: answer tasks until the driver closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    threading.Thread(target=_die_with_driver, args=(lifeline,), daemon=True).start()
    settle_in()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        function, arguments = job
        pipe.send(("taken", None))
        pipe.send(answer(function, arguments))


def answer(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, Any]:
    """Call a task; whatever it raises becomes an answer, because the driver must hear of it."""
    try:
        return "done", function(**arguments)
    except LLMTrainError as error:
        return "refused", DataError(str(error))
    except (ImportError, OSError) as error:
        refused = refusal(error)
        return ("refused", refused) if refused else ("failed", traceback.format_exc())
    except Exception:
        return "failed", traceback.format_exc()
    finally:
        give_back()


def answer_within(
    time_limit_s: float, folder: str, function: Callable[..., Any], arguments: dict[str, Any]
) -> tuple[str, Any]:
    """Call a task in a process that nobody here watches: the kernel ends it after the limit.

    ``folder`` is that of the driver, so that relative paths mean the same.
    """
    settle_in()
    try:
        os.chdir(folder)
    except OSError as error:
        return "refused", DataError(
            f"{socket.gethostname()} cannot enter {folder} ({os.strerror(error.errno or 0)}); "
            "start the run in a folder that all machines share"
        )
    signal.setitimer(signal.ITIMER_REAL, time_limit_s)
    try:
        return answer(function, arguments)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _die_with_driver(lifeline: Connection) -> None:
    """Leave at once when the driver's end of the lifeline closes, even in the middle of a task."""
    try:
        lifeline.recv()
    except (EOFError, OSError):
        os._exit(1)
