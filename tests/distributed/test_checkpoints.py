"""Ranks save, fail and refuse together."""

import random
import threading
import time
from pathlib import Path

import pytest

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.restore import load_model_weights
from tests.distributed.checkpoints import (
    find_slowly,
    full_disk_on_one_rank,
    hash_own_part,
    restore_damaged,
    restored_values,
    resume_while_training,
    save_for_ever,
    stand_still,
)
from tests.distributed.layouts import LAYOUTS, SINGLE
from tests.world import RankError, RankPool

SAVE_LIMIT_S = 60.0


def test_a_disk_full_on_one_rank_fails_the_save_on_all_and_keeps_the_old(
    ranks: RankPool, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    results = ranks.run(full_disk_on_one_rank, str(folder), size=2)
    assert results == [(True, False, True, 1.0)] * 2
    assert [step for step, _ in archive.scan(folder)] == [1]
    weights = load_model_weights(tmp_path)
    assert {name: tensor.unique().tolist() for name, tensor in weights.items()} == {
        "layer0.weight": [1.0],
        "layer1.weight": [2.0],
    }

    for path in (folder / "step-000000001").glob("__*"):
        path.write_bytes(path.read_bytes()[:-1])
    messages = ranks.run(restore_damaged, str(folder), size=2)
    assert messages[0] == messages[1]
    assert "is whole" in messages[0]


@pytest.mark.parametrize("name", [SINGLE.name, "pp2 1f1b", "fsdp2", "deepspeed zero2 dp2"])
def test_saved_behind_the_training_it_goes_on_bit_by_bit(
    ranks: RankPool, deepspeed_ranks: RankPool, tmp_path: Path, name: str
) -> None:
    layout = SINGLE if name == SINGLE.name else LAYOUTS[name]
    pool = deepspeed_ranks if name.startswith("deepspeed") else ranks
    folder = tmp_path / "checkpoints"
    for saved, losses, again, same in pool.run(
        resume_while_training, layout.config, str(folder), size=layout.size
    ):
        assert saved
        assert losses == again
        assert same


def test_replicas_write_each_number_once(ranks: RankPool, tmp_path: Path) -> None:
    written = {}
    for name in (SINGLE.name, "dp2"):
        layout = SINGLE if name == SINGLE.name else LAYOUTS[name]
        folder = tmp_path / name.replace(" ", "-")
        ranks.run(resume_while_training, layout.config, str(folder), size=layout.size)
        files = archive.locate(folder).meta["files"]
        written[name] = sum(r["bytes"] for n, r in files.items() if n.startswith("__"))
        assert len([n for n in files if n.startswith("__")]) == layout.size
    assert written["dp2"] == written[SINGLE.name]


def kill_among_saves(pool: RankPool, folder: Path, reached: int, delay_s: float) -> None:
    """End the ranks some time after a save beyond step ``reached``, however slow they are."""
    deadline = time.monotonic() + SAVE_LIMIT_S
    while max((step for step, _ in archive.scan(folder)), default=0) <= reached:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    time.sleep(delay_s)
    pool.strike()


@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_any_moment_of_a_save_only_whole_checkpoints_are_left(
    tmp_path: Path, size: int
) -> None:
    moments, folder = random.Random(size), tmp_path / "checkpoints"
    reached = 0
    with RankPool() as pool:
        for _ in range(6):
            moment = (folder, reached, moments.uniform(0.0, 0.3))
            killed = threading.Thread(target=kill_among_saves, args=(pool, *moment))
            killed.start()
            with pytest.raises(RankError):
                pool.run(save_for_ever, str(folder), size=size)
            killed.join()
            left = [archive.open_checkpoint(path).step for _, path in archive.scan(folder)]
            for step, values, hidden in pool.run(restored_values, str(folder), size=size):
                assert step == max(left)
                assert values == {float(step)}
                assert hidden == []
            assert max(left) > reached
            reached = max(left)


def test_a_long_check_and_a_long_fetch_are_no_hang(ranks: RankPool, tmp_path: Path) -> None:
    """Each takes five seconds, where collectives may last three."""
    mirror = f"file://{tmp_path}/mirror"
    for checked, fetched, beats in ranks.run(find_slowly, f"{tmp_path}/run", mirror, size=2):
        assert (checked, fetched) == (3, 3)
        assert beats >= 4


def test_ranks_share_the_reading(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(hash_own_part, str(tmp_path), size=2)
    (first, whole), (second, _) = found
    assert first + second == whole
    assert max(first, second) < 0.7 * whole


def test_work_that_does_not_move_or_fails_ends_on_every_rank(ranks: RankPool) -> None:
    told = ranks.run(stand_still, size=2)
    still = "TimeoutError: ranks [1] have read nothing for 2 s; look at the disk"
    assert told[0] == f"{still}; RuntimeError: rank 1: PermissionError: not yours"
    assert told[1] == f"{still}; PermissionError: not yours"
