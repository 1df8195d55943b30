"""The queue in a folder: each task is taken once, and none is lost with its worker."""

import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.execute.task_queue import ServeLimits, TaskQueue, serve
from llmtrain.errors import DataError

LIMITS = ServeLimits(task_s=30.0, idle_s=0.1, total_s=100.0, folder=".")


@pytest.fixture
def queue(tmp_path: Path) -> TaskQueue:
    queue = TaskQueue(tmp_path / "queue")
    queue.create()
    return queue


def double(x: int) -> int:
    return 2 * x


def refuse() -> None:
    raise DataError("the input is wrong")


def fail() -> None:
    raise ValueError("something broke")


def answers(queue: TaskQueue) -> dict[str, tuple[str, Any]]:
    return dict(queue.answers())


def test_worker_answers_in_order_and_leaves_when_idle(queue: TaskQueue) -> None:
    for name in ("2.1", "1.1", "3.1"):
        queue.put(name, double, {"x": int(name[0])})
    assert queue.open_names() == ["1.1", "2.1", "3.1"]
    assert serve(queue.folder, "job", LIMITS) == 3
    assert answers(queue) == {f"{x}.1": ("done", 2 * x) for x in (1, 2, 3)}
    assert (queue.open_names(), queue.taken(), answers(queue)) == ([], {}, {})


def test_what_a_task_raises_is_an_answer(queue: TaskQueue) -> None:
    queue.put("1.1", refuse, {})
    queue.put("2.1", fail, {})
    assert serve(queue.folder, "job", LIMITS) == 2
    found = answers(queue)
    assert found["1.1"][0] == "refused"
    assert str(found["1.1"][1]) == "the input is wrong"
    assert found["2.1"][0] == "failed"
    assert "something broke" in found["2.1"][1]


def test_no_task_is_taken_twice(queue: TaskQueue) -> None:
    names = [f"{i:03d}" for i in range(200)]
    for name in names:
        queue.put(name, double, {"x": 1})
    taken: dict[str, list[str]] = {owner: [] for owner in "abcd"}

    def take_all(owner: str) -> None:
        offered = iter(queue.open_names())
        while name := queue.take(owner, offered):
            taken[owner].append(name)

    threads = [threading.Thread(target=take_all, args=(owner,)) for owner in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = [(name, owner) for owner, mine in taken.items() for name in mine]
    assert sorted(name for name, _ in pairs) == names
    assert {name: owner for name, (owner, _) in queue.taken().items()} == dict(pairs)


def test_job_that_was_requeued_hands_in_what_it_had(queue: TaskQueue) -> None:
    queue.put("1.1", double, {"x": 1})
    queue.put("2.1", double, {"x": 2})
    assert queue.take("mine", iter(["1.1"])) == "1.1"
    assert queue.take("other", iter(["2.1"])) == "2.1"
    assert serve(queue.folder, "mine", LIMITS) == 0
    assert answers(queue) == {"1.1": ("lost", "its job mine was requeued by Slurm")}
    assert list(queue.taken()) == ["2.1"]


@pytest.mark.parametrize("limits", [LIMITS, ServeLimits(30.0, 10.0, 33.0, ".")])
def test_worker_takes_nothing_once_it_has_to_leave(queue: TaskQueue, limits: ServeLimits) -> None:
    """It was told to stop, or its job may end before the task would."""
    queue.put("1.1", double, {"x": 1})
    if limits is LIMITS:
        queue.stop()
    assert serve(queue.folder, "job", limits) == 0
    assert queue.open_names() == ["1.1"]


def test_tasks_are_withdrawn(queue: TaskQueue) -> None:
    for name in ("1.1", "2.1", "3.1"):
        queue.put(name, double, {"x": 1})
    assert queue.take("job", iter(["1.1"])) == "1.1"
    queue.withdraw("1.1")
    queue.withdraw("2.1")
    assert (queue.open_names(), queue.taken()) == (["3.1"], {})
    queue.withdraw()
    assert queue.open_names() == []
