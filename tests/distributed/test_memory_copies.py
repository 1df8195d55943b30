"""Copies in the memory of several nodes: what is lost with one comes from another."""

import random
import threading
import time
from pathlib import Path

import pytest

from llmtrain.checkpoint import archive
from tests.distributed import memory_copies as bodies
from tests.world import RankError, RankPool

NODES = ["a", "b", "c"]
STEP = archive.folder_name(14)
LIMIT_S = 60.0


def trained(ranks: RankPool, root: Path, size: int) -> list[list[str]]:
    """A run that ended after step 15: 10 is on disk, 14 in memory."""
    return ranks.run(bodies.train, str(root), 15, NODES, size=size)


def resumed(ranks: RankPool, root: Path, nodes: list[str], names: int) -> tuple[int, set[float]]:
    """What ranks on these nodes go on from: its step, and what all tensors hold."""
    found = ranks.run(bodies.resume, str(root), nodes, names, size=len(nodes))
    assert len({step for step, *_ in found}) == 1
    return found[0][0], set().union(*(values for _, values, *_ in found))


def test_each_node_holds_its_files_and_those_of_the_one_before(
    ranks: RankPool, tmp_path: Path
) -> None:
    assert trained(ranks, tmp_path, 3) == [
        [f"{STEP}/__{n}_0.distcp" for n in sorted((rank, (rank - 1) % 3))] for rank in range(3)
    ]


@pytest.mark.parametrize("lost", ["a", "b"])
def test_a_lost_node_gets_its_files_from_the_other(
    ranks: RankPool, tmp_path: Path, lost: str
) -> None:
    trained(ranks, tmp_path, 2)
    bodies.lose(str(tmp_path), lost)
    assert resumed(ranks, tmp_path, NODES[:2], 2) == (14, {14.0})
    assert resumed(ranks, tmp_path, ["b", "a"], 2) == (14, {14.0})


def test_one_node_of_three_may_be_lost_and_two_neighbours_may_not(
    ranks: RankPool, tmp_path: Path
) -> None:
    trained(ranks, tmp_path, 3)
    bodies.lose(str(tmp_path), "b")
    assert resumed(ranks, tmp_path, NODES, 3) == (14, {14.0})
    bodies.lose(str(tmp_path), "a")
    assert resumed(ranks, tmp_path, NODES, 3) == (10, {10.0})


def test_a_damaged_file_comes_from_the_other_node(ranks: RankPool, tmp_path: Path) -> None:
    trained(ranks, tmp_path, 2)
    (path,) = tmp_path.glob(f"memory/*/a/{STEP}/__0_0.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert resumed(ranks, tmp_path, NODES[:2], 2) == (14, {14.0})
    assert not path.exists()


def test_damaged_on_every_node_the_disk_is_used(ranks: RankPool, tmp_path: Path) -> None:
    trained(ranks, tmp_path, 2)
    for path in tmp_path.glob(f"memory/*/*/{STEP}/__1_0.distcp"):
        path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    assert resumed(ranks, tmp_path, NODES[:2], 2) == (10, {10.0})


@pytest.mark.parametrize("nodes", [["a"], ["b"], ["a", "a"], ["c", "b", "a"]])
def test_other_ranks_on_other_nodes_read_the_same(
    ranks: RankPool, tmp_path: Path, nodes: list[str]
) -> None:
    trained(ranks, tmp_path, 2)
    assert resumed(ranks, tmp_path, nodes, 2) == (14, {14.0})


def test_a_rank_that_cannot_write_fails_the_copy_of_its_node_and_not_the_next(
    ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks.run(bodies.full_on_one_rank, str(tmp_path), size=2) == [([], [4])] * 2


def test_nodes_that_do_not_reach_each_other_train_without(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(bodies.out_of_reach, str(tmp_path), NODES, size=2) == [[10], [10]]
    assert list(tmp_path.glob("memory/*/*/step-*")) == []
    assert archive.locate(tmp_path / "run").step == 10


def kill_among_saves(pool: RankPool, root: Path, reached: int, delay_s: float) -> None:
    deadline = time.monotonic() + LIMIT_S

    def newest() -> int:
        steps = [archive.step_of(path.name) or 0 for path in root.glob("memory/*/*/step-*")]
        return max(steps, default=0)

    while newest() <= reached and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay_s)
    pool.strike()


def test_killed_at_any_moment_there_is_a_whole_copy(tmp_path: Path) -> None:
    moments, reached = random.Random(1), 0
    with RankPool() as pool:
        for number in range(6):
            moment = (tmp_path, reached, moments.uniform(0.0, 0.3))
            killed = threading.Thread(target=kill_among_saves, args=(pool, *moment))
            killed.start()
            with pytest.raises(RankError):
                pool.run(bodies.save_for_ever, str(tmp_path), NODES, size=2)
            killed.join()
            if number % 2:
                bodies.lose(str(tmp_path), moments.choice(NODES[:2]))
            step, values = resumed(pool, tmp_path, NODES[:2], 2)
            assert values == {float(step)}
            assert step > reached
            reached = step
        assert archive.scan(tmp_path / "run" / "checkpoints") == []
