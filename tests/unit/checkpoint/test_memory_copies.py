"""Copies of the state in memory, on one node: what a start goes on from, and what it never does."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import archive, tensor_files
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.memory_copies import MARK_FILE
from llmtrain.config.training import CheckpointConfig
from tests.unit.checkpoint.test_checkpoints import FACTS, State, at, files_of_at_most, small_disk


class Place:
    """A run's folder and the memory of its node."""

    def __init__(self, root: Path) -> None:
        self.disk = root / "run" / "checkpoints"
        self.memory = root / "memory"
        self.made: list[Checkpoints] = []

    def start(self, state: State, memory: bool = True, asynchronous: bool = True) -> Checkpoints:
        """A process of the run, which saves every 10 steps, in memory every 2."""
        config = CheckpointConfig(
            every_steps=10, memory_every_steps=2 if memory else None, memory_dir=str(self.memory),
            asynchronous=asynchronous,
        )  # fmt: skip
        made = Checkpoints(self.disk, config, state, facts=FACTS)
        self.made.append(made)
        return made

    def train(self, made: Checkpoints, steps: range, state: State) -> None:
        """Count steps in the state, and save where it is due."""
        for step in steps:
            state.tensors["optim.step"].fill_(step)
            if made.due(at(step)):
                made.save(at(step))
                assert made.wait()

    def resume(self, **how: bool) -> tuple[int, float]:
        """What a new process goes on from: its step, and what its tensors say."""
        state, progress = State(9), at(0)
        self.start(state, **how).restore(progress)
        return progress.step, float(state.tensors["optim.step"])

    @property
    def kept(self) -> list[Path]:
        return sorted(self.memory.rglob("step-*"))

    @property
    def on_disk(self) -> list[int]:
        return sorted(step for step, _ in archive.scan(self.disk))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for made in place.made:
        made.close()


@pytest.fixture
def killed(place: Place) -> Place:
    """A run that ended by a fault after step 15: 10 is on disk, 14 in memory."""
    state = State(1)
    made = place.start(state)
    made.restore(at(0))
    made.prepare()
    place.train(made, range(1, 16), state)
    assert place.on_disk == [10]
    assert [path.name for path in place.kept] == [archive.folder_name(14)]
    return place


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_start_goes_on_from_memory_bit_by_bit_where_that_is_newer(
    place: Place, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    saved, found = State(1, width=300), State(2, width=300)
    made = place.start(saved, asynchronous=asynchronous)
    made.restore(at(0))
    made.prepare()
    place.train(made, range(1, 13), saved)
    with caplog.at_level(logging.INFO):
        assert place.start(found, asynchronous=asynchronous).restore(progress := at(0))
    assert progress.step == 12
    assert all(torch.equal(found.tensors[name], saved.tensors[name]) for name in saved.tensors)
    assert f"resumed from memory, not from disk: {place.memory}" in caplog.text


def test_a_step_due_for_both_is_the_same_on_disk_and_in_memory(place: Place) -> None:
    state = State(1, width=300)
    made = place.start(state)
    made.prepare()
    place.train(made, range(10, 11), state)
    on_disk, kept = archive.locate(place.disk), archive.open_checkpoint(place.kept[0])
    assert (on_disk.step, kept.step) == (10, 10)
    assert on_disk.meta["files"] == kept.meta["files"]


def test_a_step_due_in_memory_alone_goes_to_disk_when_it_is_asked_for_again(place: Place) -> None:
    state = State(1)
    made = place.start(state)
    made.prepare()
    place.train(made, range(1, 5), state)
    assert place.on_disk == []
    assert made.save(at(4))
    assert made.wait()
    assert place.on_disk == [4]


def test_a_step_gone_on_from_in_memory_can_be_saved_on_disk(killed: Place) -> None:
    made = killed.start(State(9))
    made.restore(progress := at(0))
    assert made.save(progress)
    assert made.wait()
    assert killed.on_disk == [10, 14]


@pytest.mark.parametrize("damage", ["flip", "cut", "meta"])
def test_a_damaged_copy_is_noticed_and_the_disk_is_used(
    killed: Place, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = killed.kept[0] / ("meta.json" if damage == "meta" else "__0_0.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content[:-1] if damage == "cut" else content)
    assert killed.resume() == (10, 10.0)
    if damage == "flip":
        assert "__0_0.distcp does not match its checksum" in caplog.text
    assert killed.resume() == (10, 10.0)
    assert killed.kept == []


def test_where_the_newest_on_disk_is_damaged_memory_is_newer_than_the_one_before(
    killed: Place,
) -> None:
    path = killed.disk / archive.folder_name(20)
    shutil.copytree(killed.disk / archive.folder_name(10), path)
    archive.amend(path, step=20)
    (path / "__0_0.distcp").write_bytes(b"")
    assert killed.resume() == (14, 14.0)


def test_the_disk_is_used_where_it_is_newer(killed: Place) -> None:
    shutil.copytree(killed.disk / archive.folder_name(10), killed.disk / archive.folder_name(16))
    archive.amend(killed.disk / archive.folder_name(16), step=16)
    assert killed.resume() == (16, 10.0)


@pytest.mark.parametrize("how", ["go_back", "distrust"])
@pytest.mark.parametrize("deleted", [True, False])
def test_going_back_is_not_undone_by_memory(killed: Place, how: str, deleted: bool) -> None:
    """Not even by copies that could not be deleted, as on a node that was away."""
    aside = killed.memory.with_name("away")
    shutil.copytree(killed.memory, aside)
    made = killed.start(State(9))
    assert made.restore(at(0))
    if how == "go_back":
        made.go_back(archive.locate(killed.disk))
    else:
        made.distrust(12)
    if not deleted:
        shutil.rmtree(killed.memory)
        aside.rename(killed.memory)
    assert killed.resume() == (10, 10.0)


def test_copies_from_before_they_were_off_are_not_used(killed: Place) -> None:
    assert killed.resume(memory=False) == (10, 10.0)
    assert killed.resume() == (10, 10.0)


def test_another_run_in_the_same_folder_uses_no_copies(killed: Place) -> None:
    shutil.rmtree(killed.disk.parent)
    assert killed.resume() == (0, 9.0)
    assert killed.kept == []


def test_a_copied_run_folder_has_no_copies_of_its_own(killed: Place) -> None:
    other = Place(killed.disk.parent.parent / "other")
    shutil.copytree(killed.disk, other.disk)
    other.memory = killed.memory
    assert (other.disk / MARK_FILE).exists()
    assert other.resume() == (10, 10.0)
    assert killed.resume() == (14, 14.0)


def test_a_run_that_has_ended_gives_the_memory_back(killed: Place) -> None:
    made = killed.start(State(9))
    made.restore(at(0))
    made.drop_memory()
    assert list(killed.memory.iterdir()) == []


def test_memory_open_to_others_is_not_read(killed: Place, caplog: pytest.LogCaptureFixture) -> None:
    killed.kept[0].parent.chmod(0o755)
    assert killed.resume() == (10, 10.0)
    assert "is open to other users" in caplog.text


def test_too_little_room_is_one_warning_and_the_run_goes_on(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    state = State(1, width=20_000)  # 800 kB
    with small_disk(place.memory, "1M"):
        made = place.start(state)
        made.prepare()
        place.train(made, range(1, 21), state)
        assert place.kept == []
    assert place.on_disk == [10, 20]
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "the newest copy and the one in the making need" in said
    assert "the run goes on without copies in memory: make room (mount -o remount,size=" in said


def test_memory_that_fills_up_is_said_once_and_the_disk_is_still_written(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    state = State(1, width=5000)
    made = place.start(state)
    made.prepare()
    place.train(made, range(1, 3), state)
    with files_of_at_most(1000):
        place.train(made, range(3, 9), state)
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len([r for r in warned if "is not kept in memory" in r.getMessage()]) == 1
    assert [path.name for path in place.kept] == [archive.folder_name(2)]
    place.train(made, range(9, 11), state)
    assert json.loads((place.kept[0] / "meta.json").read_text())["step"] == 10
    assert place.on_disk == [10]


def test_a_disk_save_is_written_from_the_state_where_memory_has_no_room(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(1)
    made = place.start(state)
    made.prepare()
    write = tensor_files.write

    def refuse(path: Path, *rest: object) -> object:
        if place.memory in path.parents:
            raise OSError("No space left on device")
        return write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_files, "write", refuse)
    place.train(made, range(10, 11), state)
    assert (place.on_disk, place.kept) == ([10], [])
    assert place.resume(memory=False) == (10, 10.0)
