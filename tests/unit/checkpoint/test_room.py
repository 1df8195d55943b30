"""What is said about a disk before the first checkpoint."""

from pathlib import Path

import pytest

from llmtrain.checkpoint import room
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError


def check(folder: Path, need: int, *, held: int = 0, step: int = 0, keep_last: int = 3) -> None:
    config = CheckpointConfig(every_steps=10, keep_last=keep_last)
    room.check(folder, need=need, config=config, held=held, step=step, num_steps=100)


def test_a_disk_without_room_for_one_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="bytes free, one checkpoint of this "):
        check(tmp_path / "new", 10**18)
    check(tmp_path, 10**18, step=100)  # nothing is left to save


def test_a_disk_with_room_for_fewer_than_stay_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    free = room.free_bytes(tmp_path)
    check(tmp_path, free // 20)
    assert not caplog.records
    check(tmp_path, int(free / 2.5))
    [warning] = caplog.messages
    assert "room for 2 checkpoints" in warning
    assert "but 4 more are to be there at a time" in warning
    caplog.clear()
    check(tmp_path, int(free / 2.5), held=2)
    check(tmp_path, int(free / 2.5), step=85)
    assert not caplog.records


def test_those_that_stay_for_good_and_the_best_count(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_best=1, keep_every_steps=1000)
    assert room.most_kept(config, 10_500) == 2 + 1 + 10 + 1


def test_memory_is_no_more_than_the_host_has(tmp_path: Path) -> None:
    assert 0 < room.free_memory_bytes(tmp_path) <= room.free_bytes(tmp_path)
