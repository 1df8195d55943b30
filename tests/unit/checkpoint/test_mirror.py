"""Copies of checkpoints on fsspec's local and memory file systems."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.mirror import Mirror
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


def write(directory: Path, step: int, score: float = 0.0) -> Path:
    aside = archive.fresh_aside(directory, step)
    (aside / "data").write_bytes(b"weights of %d" % step)
    about = {"step": step, "scores": {"validation_loss": score}}
    return archive.commit(aside, about, archive.digests(aside, ["data"]))


def copies(mirror: Mirror) -> list[int]:
    return sorted(mirror._folders())


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
    assert mirror._steps() == [2]


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
