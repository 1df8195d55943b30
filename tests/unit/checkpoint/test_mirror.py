"""Copies of checkpoints on fsspec's local and memory file systems."""

import json
import logging
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from blake3 import blake3

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.mirror import Mirror
from llmtrain.checkpoint.mirror_folder import MirrorFolder
from llmtrain.checkpoint.retention import Keep
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError, ConfigError
from tests.unit.checkpoint.test_checkpoints import State, at, make_with


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def write(
    directory: Path, step: int, score: float = 0.0, line: tuple[int, ...] = (), name: str = "run"
) -> Path:
    aside = archive.fresh_aside(directory, step)
    (aside / "data").write_bytes(b"weights of %d" % step)
    about = {
        "step": step, "scores": {"validation_loss": score}, "line": list(line),
        "carried": {"name": name},
    }  # fmt: skip
    return archive.commit(aside, about, archive.digests(aside, ["data"]))


def copies(mirror: Mirror) -> list[int]:
    return mirror._folder.steps()


def put(mirror: Mirror, path: Path) -> None:
    mirror.start(path)
    mirror.wait()


@pytest.mark.parametrize("url", ["file://{}/mirror", "memory://bucket/runs/one"])
def test_what_is_brought_back_is_what_was_copied(tmp_path: Path, memory: Any, url: str) -> None:
    mirror = Mirror(url.format(tmp_path), Keep(last=2))
    assert mirror.fetch(tmp_path / "new") is None
    for step in (1, 2, 3):
        put(mirror, write(tmp_path / "here", step))
    assert copies(mirror) == [2, 3]
    found = mirror.fetch(tmp_path / "new")
    assert found is not None
    assert found.step == 3
    assert (found.path / "data").read_bytes() == b"weights of 3"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step-000000003"]


def test_the_best_are_kept_there_too(tmp_path: Path, memory: Any) -> None:
    mirror = Mirror("memory://bucket/runs/one", Keep(last=1, best=1))
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
        put(mirror, write(tmp_path, step, score))
    assert copies(mirror) == [2, 3]


def test_a_copy_cut_short_does_not_exist_and_a_damaged_one_is_passed_over(
    tmp_path: Path, memory: Any
) -> None:
    mirror = Mirror("memory://bucket/runs/one", Keep(last=5))
    for step in (1, 2, 3):
        put(mirror, write(tmp_path / "here", step))
    memory.rm_file("/bucket/runs/one/step-000000003/meta.json")
    memory.pipe_file("/bucket/runs/one/step-000000002/data", b"weights of 3")
    found = mirror.fetch(tmp_path / "new")
    assert found is not None
    assert found.step == 1
    memory.pipe_file("/bucket/runs/one/step-000000001/data", b"weights of 3")
    with pytest.raises(CheckpointError, match=r"is whole: .*step-000000002.*step-000000001"):
        mirror.fetch(tmp_path / "newer")


def test_a_mirror_that_fails_is_said_and_tried_again(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = Mirror("memory://bucket/runs/one", Keep(last=5))

    def refuse(*_: object) -> None:
        raise PermissionError("the bucket is not yours")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(type(memory), "put_file", refuse)
        put(mirror, write(tmp_path, 1))
    assert "has no copy of step-000000001 (the bucket is not yours)" in caplog.text
    put(mirror, write(tmp_path, 2))
    assert list(mirror._folder.metas()) == [2]


def test_a_run_on_a_new_disk_goes_on_from_the_mirror(tmp_path: Path) -> None:
    config = CheckpointConfig(mirror=f"file://{tmp_path}/mirror", keep_last=1)
    saved, other = State(1), State(2)
    checkpoints = make_with(tmp_path / "old", saved, config)
    for step in (10, 20):
        checkpoints.save(at(step))
        assert checkpoints.wait()
    checkpoints.wait_for_mirror()
    fresh = make_with(tmp_path / "new", other, config)
    progress = at(0)
    assert fresh.restore(progress)
    assert progress.step == 20
    assert all((other.tensors[name] == tensor).all() for name, tensor in saved.tensors.items())
    assert fresh.restored is not None
    assert fresh.restored.meta["carried"] == {"wandb_id": "abc"}
    assert json.loads((tmp_path / "new/step-000000020/meta.json").read_text())["step"] == 20


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://bucket", "cannot be reached .*use an address fsspec knows"),
        ("s3://bucket/run", "needs a package that is not installed .*pip install"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mirror(url, Keep(last=1))


MIRROR = "memory://bucket/runs/one"


class Run:
    """Checkpoints of a run with a mirror, and the next machine it comes to."""

    def __init__(self, here: Path, keep_last: int = 5) -> None:
        self.config = CheckpointConfig(mirror=MIRROR, keep_last=keep_last, every_steps=5)
        self.here = here
        self.start()

    def start(self) -> int:
        """Start the process anew; the step it goes on from."""
        self.checkpoints = make_with(self.here, State(1), self.config)
        progress = at(0)
        self.checkpoints.restore(progress)
        return progress.step

    def save(self, *steps: int) -> None:
        for step in steps:
            self.checkpoints.save(at(step))
            assert self.checkpoints.wait()
            self.settle()

    def settle(self) -> None:
        self.checkpoints.wait_for_mirror()

    def back(self, step: int) -> None:
        to = self.checkpoints.before(step + 1)
        assert to is not None
        assert to.step == step
        self.checkpoints.go_back(to, journal={"left_out": step})

    @property
    def copies(self) -> list[int]:
        return MirrorFolder(MIRROR).steps()

    def fetched(self) -> archive.Checkpoint:
        """What an empty machine begins with."""
        with tempfile.TemporaryDirectory() as folder:
            found = Mirror(MIRROR, Keep(last=1), Path(folder)).fetch(Path(folder))
        assert found is not None
        return found


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("no route to the bucket")


@contextmanager
def cut_off(memory: Any, *calls: str) -> Iterator[None]:
    """The store cannot be reached, or takes none of these calls."""
    with pytest.MonkeyPatch.context() as patch:
        for name in calls or ("ls", "cat_file", "put_file", "rm", "rm_file", "mv", "makedirs"):
            patch.setattr(type(memory), name, unreachable)
        yield


def test_going_back_leaves_no_undone_step_there(tmp_path: Path, memory: Any) -> None:
    run = Run(tmp_path)
    run.save(5, 10, 15)
    run.back(5)
    run.settle()
    assert run.copies == [5]
    assert run.fetched().meta["journal"] == {"left_out": 5}
    run.save(10)
    assert run.copies == [5, 10]
    assert run.fetched().meta["line"] == [5]


def test_new_copies_stay_where_undone_ones_of_later_steps_cannot_be_deleted(
    tmp_path: Path, memory: Any
) -> None:
    run = Run(tmp_path, keep_last=2)
    run.save(5, 10, 15)
    with cut_off(memory, "rm", "rm_file"):
        run.back(10)
        run.settle()
        assert run.copies == [10, 15]
        found = run.fetched()
        assert (found.step, found.meta["journal"]) == (10, {"left_out": 10})
        run.checkpoints.save(at(12))
        assert run.checkpoints.wait()
        run.settle()
        assert run.fetched().step == 12
    run.save(14)
    assert run.copies == [12, 14]


@pytest.mark.parametrize("method", ["renew", "_put_whole"])
def test_a_checkpoint_deleted_here_meanwhile_is_no_reason_not_to_follow(
    tmp_path: Path, memory: Any, method: str
) -> None:
    run = Run(tmp_path)
    run.save(5, 10, 15)
    with cut_off(memory):
        run.back(10)
        run.settle()
    original = getattr(MirrorFolder, method)

    def late(folder: MirrorFolder, path: Path, *others: Any) -> Any:
        deleted = path if path.is_dir() else path.parent
        if deleted.name == "step-000000010":
            archive.remove(deleted)
        return original(folder, path, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MirrorFolder, method, late)
        run.save(12)
    assert run.copies == [5, 10, 12]
    assert run.fetched().meta["line"] == [10]


def test_a_store_out_of_reach_during_a_rollback_is_told_later(tmp_path: Path, memory: Any) -> None:
    run = Run(tmp_path)
    run.save(5, 10)
    with cut_off(memory):
        run.back(5)
        run.settle()
    assert run.copies == [5, 10]
    assert run.start() == 5  # another process, on the same disk
    run.settle()
    assert run.copies == [5]
    assert run.fetched().meta["journal"] == {"left_out": 5}
    assert json.loads((tmp_path / "mirror.json").read_text()) == {}


def test_killed_between_the_note_and_the_rollback_nothing_is_lost(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.save(5, 10)
    with monkeypatch.context() as patch:
        patch.setattr(archive, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.back(5)
    assert run.start() == 10
    run.settle()
    assert run.fetched().step == 10
    run.save(15)
    assert run.fetched().step == 15


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_is_distrusted_is_set_aside_there_too(tmp_path: Path, memory: Any) -> None:
    run = Run(tmp_path)
    run.save(5, 10)
    run.checkpoints.distrust(6)
    run.settle()
    assert run.copies == [5]
    assert memory.exists("/bucket/runs/one/.damaged-step-000000010/meta.json")
    assert run.start() == 5
    run.save(10)
    assert run.copies == [5, 10]
    assert run.fetched().meta["line"] == [6]


def test_where_everything_is_distrusted_an_unreachable_mirror_gives_none_of_it_back(
    tmp_path: Path, memory: Any
) -> None:
    run = Run(tmp_path)
    run.save(5, 10)
    with cut_off(memory):
        run.checkpoints.distrust(0)
        run.settle()
    assert run.start() == 0
    run.settle()
    assert run.copies == []
    run.save(5)
    assert run.copies == [5]
    assert run.start() == 5


def test_a_copy_under_way_of_an_undone_step_is_given_up(tmp_path: Path, memory: Any) -> None:
    run = Run(tmp_path)
    run.save(5)
    put, begun, go_on = memory.put_file, threading.Event(), threading.Event()

    def slowly(path: str, there: str) -> None:
        begun.set()
        assert go_on.wait(10)
        put(path, there)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "put_file", slowly)
        run.checkpoints.save(at(10))
        assert run.checkpoints.wait()
        assert begun.wait(10)
        run.back(5)
        go_on.set()
        run.settle()
    assert list(MirrorFolder(MIRROR).metas()) == [5]
    assert run.fetched().meta["line"] == [5]


def test_a_disk_that_the_run_has_left_behind_gives_way_to_the_mirror(
    tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old = Run(tmp_path / "old")
    old.save(5, 10)
    assert Run(tmp_path / "new").start() == 10
    Run(tmp_path / "new").save(15)
    assert old.start() == 15
    assert archive.open_checkpoint(tmp_path / "old/step-000000015").step == 15
    old.save(20)
    with cut_off(memory):
        assert Run(tmp_path / "new").start() == 15
    assert "newer than step-000000015 cannot be used (it cannot be read: no route" in caplog.text


def test_what_the_run_undid_elsewhere_is_set_aside_here(tmp_path: Path, memory: Any) -> None:
    old, new = Run(tmp_path / "old"), Run(tmp_path / "new")
    old.save(5)
    assert new.start() == 5
    new.save(10, 15)
    assert old.start() == 15
    new.back(10)
    new.settle()
    assert old.start() == 10
    assert old.checkpoints.restored is not None
    assert old.checkpoints.restored.meta["journal"] == {"left_out": 10}
    assert [step for step, _ in archive.scan(tmp_path / "old")] == [10, 5]
    new.save(12)
    assert old.start() == 12


def test_a_checkpoint_that_is_damaged_here_comes_from_the_mirror(
    tmp_path: Path, memory: Any
) -> None:
    run = Run(tmp_path)
    run.save(5, 10)
    for step in (10, 5):
        next((tmp_path / f"step-{step:09}").glob("*.distcp")).write_bytes(b"damaged")
        assert run.start() == 10
        assert archive.open_checkpoint(tmp_path / "step-000000010").step == 10
    for copy in ("step-000000005", "step-000000010"):
        memory.pipe_file(f"/bucket/runs/one/{copy}/meta.json", b"damaged")
    assert run.start() == 10


def test_a_run_that_has_gone_back_here_does_not_go_on_from_what_is_further_there(
    tmp_path: Path, memory: Any
) -> None:
    run = Run(tmp_path)
    run.save(5, 10)
    with cut_off(memory):
        run.back(5)
        run.settle()
    (tmp_path / "mirror.json").unlink()  # what is to be told is in the checkpoint too
    assert run.start() == 5


def test_runs_do_not_share_a_mirror(
    tmp_path: Path, memory: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Mirror(MIRROR, Keep(last=3), tmp_path / n, n) for n in ("first", "second"))
    assert second.fetch(tmp_path / "second") is None  # both begin at the same time
    put(first, write(tmp_path / "first", 1, name="first"))
    put(second, write(tmp_path / "second", 2, name="second"))
    assert copies(first) == [1]
    said = "has the checkpoints of the run first, this one is second; give every run an address of"
    assert said in caplog.text
    for here in (None, archive.locate(tmp_path / "second")):
        with pytest.raises(CheckpointError, match=said):
            second.fetch(tmp_path / "second", here=here)
    assert Mirror(MIRROR, Keep(last=3), None, "first").fetch(tmp_path / "new") is not None


def test_files_beside_the_checkpoints_are_there_before_them(tmp_path: Path, memory: Any) -> None:
    scores = tmp_path / "old/reference/a.npy"
    scores.parent.mkdir(parents=True)
    scores.write_bytes(b"scores")
    mirror = Mirror(MIRROR, Keep(last=1))
    mirror.keep_beside(scores)
    with cut_off(memory, "put_file"):
        put(mirror, write(tmp_path / "old/checkpoints", 1))
    put(mirror, write(tmp_path / "old/checkpoints", 2))
    new, digest = tmp_path / "new/reference/a.npy", blake3(b"scores").hexdigest()
    assert not mirror.bring_beside(new, blake3(b"others").hexdigest())
    assert not new.exists()
    assert mirror.bring_beside(new, digest)
    assert new.read_bytes() == b"scores"


def test_a_copy_is_read_once_when_it_comes_back(tmp_path: Path, memory: Any) -> None:
    mirror, tally = Mirror(MIRROR, Keep(last=1)), archive.Tally()
    path = write(tmp_path / "here", 1)
    put(mirror, path)
    assert mirror.fetch(tmp_path / "new", tally) is not None
    assert tally.num_bytes == (path / "data").stat().st_size
