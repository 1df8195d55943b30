"""The supervisor: every task once, whatever happens to its workers."""

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.dedup.minhash import MinHasher
from data_pipeline.execute.local import (
    LocalExecutor,
    Task,
    TaskFailedError,
    TaskLostError,
    answer_within,
)
from data_pipeline.execute.worker_memory import own_bytes
from llmtrain.errors import ConfigError, DataError, LLMTrainError


@pytest.fixture(scope="module")
def executor() -> Iterator[LocalExecutor]:
    with LocalExecutor(num_workers=2, time_limit_s=30) as live:
        yield live


def square(x: int) -> int:
    return x * x


def die_once(folder: str, name: str) -> str:
    """Kill the own process in the first attempt."""
    marker = Path(folder) / name
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def leave_file(folder: str, name: str) -> None:
    (Path(folder) / name).touch()


def always_die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(folder: str) -> None:
    with (Path(folder) / "attempts").open("a") as file:
        file.write("x")
    raise ValueError("something broke")


def refuse(folder: str) -> None:
    with (Path(folder) / "refusals").open("a") as file:
        file.write("x")
    raise DataError("the input is wrong")


def fill_the_disk(folder: str) -> None:
    with (Path(folder) / "writes").open("a") as file:
        file.write("x")
    raise OSError(errno.ENOSPC, "No space left on device")


def need_a_package(folder: str) -> None:
    with (Path(folder) / "imports").open("a") as file:
        file.write("x")
    raise ModuleNotFoundError("No module named 'numba'", name="numba.core")


def sleep_once(folder: str, seconds: float) -> str:
    marker = Path(folder) / "slept"
    if not marker.exists():
        marker.touch()
        time.sleep(seconds)
    return "awake"


def nap(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


class SlowToUnpickle:
    """Takes a while to arrive at a worker, as a task does whose imports are slow."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[float]]:
        return arrive_late, (self.seconds,)

    def nothing(self) -> None:
        """Take no time."""


def arrive_late(seconds: float) -> SlowToUnpickle:
    time.sleep(seconds)
    return SlowToUnpickle(seconds)


def collect(executor: LocalExecutor, tasks: list[Task]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    executor.run(tasks, lambda task, value: results.__setitem__(task.key, value))
    return results


def test_every_task_runs_once(executor: LocalExecutor) -> None:
    tasks = [Task(str(i), square, {"x": i}, cost=i) for i in range(50)]
    assert collect(executor, tasks) == {str(i): i * i for i in range(50)}
    assert len(executor.worker_pids) == 2


def test_killed_workers_are_replaced(executor: LocalExecutor, tmp_path: Path) -> None:
    tasks = [Task(f"t{i}", die_once, {"folder": str(tmp_path), "name": f"t{i}"}) for i in range(5)]
    assert collect(executor, tasks) == {f"t{i}": f"t{i}" for i in range(5)}


def test_third_death_stops_the_run(executor: LocalExecutor) -> None:
    with pytest.raises(TaskLostError, match=r"doomed failed 3 times.*signal 9"):
        executor.run([Task("doomed", always_die, {})], lambda *_: None)
    assert collect(executor, [Task("after", square, {"x": 3})]) == {"after": 9}


@pytest.mark.parametrize(
    ("function", "file", "error", "attempts"),
    [
        (fail, "attempts", TaskFailedError, 3),
        (refuse, "refusals", DataError, 1),
        (fill_the_disk, "writes", DataError, 1),
        (need_a_package, "imports", ConfigError, 1),
    ],
)
def test_faults_are_tried_again_and_wrong_input_is_not(
    executor: LocalExecutor,
    tmp_path: Path,
    function: Callable[..., None],
    file: str,
    error: type[Exception],
    attempts: int,
) -> None:
    with pytest.raises(
        error, match=r"something broke|input is wrong|No space left|needs the package numba,"
    ):
        executor.run([Task("t", function, {"folder": str(tmp_path)})], lambda *_: None)
    assert (tmp_path / file).read_text() == "x" * attempts


def test_only_what_is_no_fault_of_ours_is_one_sentence() -> None:
    assert issubclass(TaskLostError, LLMTrainError)
    assert not issubclass(TaskFailedError, LLMTrainError)


def test_answers_to_a_run_that_failed_do_not_count_in_the_next(tmp_path: Path) -> None:
    with LocalExecutor(num_workers=2) as executor:
        collect(executor, [Task(str(i), square, {"x": i}) for i in range(2)])
        slow = Task("slow", sleep_once, {"folder": str(tmp_path), "seconds": 0.5}, cost=1)
        with pytest.raises(DataError, match="input is wrong"):
            collect(executor, [slow, Task("wrong", refuse, {"folder": str(tmp_path)})])
        tasks = [Task(str(i), nap, {"seconds": 0.6}) for i in range(2)]
        assert collect(executor, tasks) == {"0": "awake", "1": "awake"}


def test_late_worker_is_replaced(tmp_path: Path) -> None:
    with LocalExecutor(num_workers=1, time_limit_s=2.0) as executor:
        task = Task("late", sleep_once, {"folder": str(tmp_path), "seconds": 600})
        assert collect(executor, [task]) == {"late": "awake"}


def test_time_to_start_a_worker_is_no_time_of_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit below the start of a process: imports and fork are not counted against it."""
    with LocalExecutor(num_workers=1, time_limit_s=0.2) as executor:
        task = Task("a", SlowToUnpickle(0.5).nothing, {})
        assert collect(executor, [task]) == {"a": None}
    monkeypatch.setattr("data_pipeline.execute.local._START_SECONDS", 0.2)
    with (
        LocalExecutor(num_workers=1, attempts=1) as executor,
        pytest.raises(TaskFailedError, match=r"no worker began it within 0\.2 s"),
    ):
        collect(executor, [Task("b", SlowToUnpickle(600).nothing, {})])


def test_a_worker_goes_on_while_its_last_result_is_handled(tmp_path: Path) -> None:
    begun: dict[str, bool] = {}

    def handle(task: Task, value: object) -> None:
        other = tmp_path / ("b" if task.key == "a" else "a")
        deadline = time.monotonic() + 20
        while not other.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        begun[task.key] = other.exists()

    with LocalExecutor(num_workers=1) as one:
        tasks = [Task(name, leave_file, {"folder": str(tmp_path), "name": name}) for name in "ab"]
        one.run(tasks, handle)
    assert begun == {"a": True, "b": True}


def test_a_result_that_comes_with_a_refusal_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Task] = []
    wrong = Task("wrong", refuse, {"folder": str(tmp_path)})
    with LocalExecutor(num_workers=2) as executor:
        ready = executor._ready

        def both_ready() -> list[Any]:
            """Both workers have answered by then; the refusal comes last."""
            time.sleep(0.3)
            return sorted(ready(), key=lambda worker: worker.task.key if worker.task else "")

        collect(executor, [Task(str(i), square, {"x": i}) for i in range(4)])
        tasks = [Task("fine", leave_file, {"folder": str(tmp_path), "name": "fine"}), wrong]
        monkeypatch.setattr(executor, "_ready", both_ready)
        with pytest.raises(DataError):
            executor.run(tasks, lambda task, _: kept.append(task))
    assert [task.key for task in kept] == ["fine"]


def test_workers_leave_with_the_executor() -> None:
    with LocalExecutor(num_workers=1) as executor:
        collect(executor, [Task("a", square, {"x": 2})])
        (pid,) = executor.worker_pids
    assert not Path(f"/proc/{pid}").exists()


def own_memory() -> int:
    """Use what every task uses, then weigh the process."""
    table = pa.table({"text": ["some words"] * 10})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    ordered = MinHasher("fineweb").band_keys(["a few words for the kernels to run on"] * 10)
    assert len(ordered) == pq.read_table(pa.BufferReader(sink.getvalue())).num_rows == 10
    return own_bytes(os.getpid())


def test_workers_share_what_they_import(executor: LocalExecutor) -> None:
    """What is a worker's own is a tenth of what it maps: budgets of 150 MB are for the data."""
    collect(executor, [Task("compile", own_memory, {})])  # what it compiles is kept on disk
    with LocalExecutor(num_workers=1) as fresh:
        assert collect(fresh, [Task("a", own_memory, {})])["a"] < 40e6


def pandas_is_loaded() -> bool:
    """Say whether making an array has loaded pandas."""
    return len(pa.array(["some words"])) == 1 and "pandas" in sys.modules


def test_workers_do_without_pandas(executor: LocalExecutor) -> None:
    assert collect(executor, [Task("a", pandas_is_loaded, {})]) == {"a": False}


def hold_and_free() -> int:
    """Fill 160 MB in pieces of 1 kB and in large ones, then free them."""
    small = [bytes([i % 256]) * 1000 for i in range(80_000)]
    large = [bytes(8_000_000) for _ in range(10)]
    return len(small) + len(large)


def weigh() -> int:
    return own_bytes(os.getpid())


def test_memory_goes_back_after_a_task() -> None:
    with LocalExecutor(num_workers=1) as executor:
        tasks = [Task("hold", hold_and_free, {}, cost=1), Task("weigh", weigh, {})]
        assert collect(executor, tasks)["weigh"] < 40e6


HELD: list[bytes] = []


def hold() -> None:
    HELD.append(b"x" * 60_000_000)


def test_worker_that_keeps_much_is_replaced_before_the_next_phase() -> None:
    with LocalExecutor(num_workers=1) as executor:
        collect(executor, [Task("small", nap, {"seconds": 0.0})])
        (first,) = executor.worker_pids
        collect(executor, [Task("hold", hold, {})])
        assert executor.worker_pids == [first]
        collect(executor, [Task("next", nap, {"seconds": 0.0})])
        assert executor.worker_pids != [first]


def test_machine_without_the_folder_is_named() -> None:
    kind, refused = answer_within(1.0, "/no/such/folder", nap, {"seconds": 0.0})
    assert kind == "refused"
    assert "cannot enter /no/such/folder (No such file or directory)" in str(refused)
