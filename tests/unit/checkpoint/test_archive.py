"""Checkpoints as files: what exists, what is damaged, what is deleted."""

import logging
from pathlib import Path

import pytest

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.retention import Keep, retire
from llmtrain.errors import CheckpointError


def write(directory: Path, step: int, content: bytes = b"weights") -> Path:
    aside = archive.fresh_aside(directory, step)
    (aside / "__0_0.distcp").write_bytes(content)
    (aside / ".metadata").write_bytes(b"index")
    files = archive.digests(aside, ["__0_0.distcp", ".metadata"])
    return archive.commit(aside, {"step": step, "facts": {}}, files)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def test_the_newest_is_found_by_its_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path, step)
    found = archive.newest_good(tmp_path)
    assert found is not None
    assert (found.step, found.path.name) == (100, "step-000000100")


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert archive.newest_good(tmp_path) is None
    assert archive.newest_good(tmp_path / "absent") is None


def test_what_was_never_committed_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 10)
    left = archive.fresh_aside(tmp_path, 20)
    (left / "__0_0.distcp").write_bytes(b"half")
    found = archive.newest_good(tmp_path)
    assert found is not None
    assert found.step == 10
    archive.fresh_aside(tmp_path, 30)
    assert not left.exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
def test_a_flipped_byte_anywhere_falls_back_and_says_so(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    size = (newest / name).stat().st_size
    intact = (newest / name).read_bytes()
    for at in range(0, size, max(1, size // 5)):
        (newest / name).write_bytes(intact)
        flip(newest / name, at)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = archive.newest_good(tmp_path)
        assert found is not None
        assert found.step == 10
        assert name in caplog.text
        assert "falling back to the one before, step-000000010" in caplog.text


@pytest.mark.parametrize("damage", ["truncate", "delete file", "delete meta"])
def test_missing_bytes_and_files_are_damage(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    data = newest / "__0_0.distcp"
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "delete file":
        data.unlink()
    else:
        (newest / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="step-000000020 is damaged"):
        archive.open_checkpoint(newest)
    found = archive.newest_good(tmp_path, move_damaged=True)
    assert found is not None
    assert found.step == 10
    assert not newest.exists()
    assert (tmp_path / ".damaged-step-000000020").exists()


def test_only_damaged_ones_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (10, 20):
        flip(write(tmp_path, step) / "__0_0.distcp", 0)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*step-000000010"):
        archive.newest_good(tmp_path)


def test_old_ones_are_deleted_and_the_newest_is_always_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    retire(tmp_path, Keep(last=2), up_to_step=40)
    assert [step for step, _ in archive.scan(tmp_path)] == [40, 30]
    retire(tmp_path, Keep(last=0), up_to_step=40)
    assert [step for step, _ in archive.scan(tmp_path)] == [40]


def test_later_ones_do_not_push_out_what_was_just_written(tmp_path: Path) -> None:
    for step in (10, 20, 40):
        write(tmp_path, step)
    retire(tmp_path, Keep(last=1), up_to_step=20)
    assert [step for step, _ in archive.scan(tmp_path)] == [40, 20]


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, 10, b"old")
    path = write(tmp_path, 10, b"new")
    assert archive.open_checkpoint(path).step == 10
    assert (path / "__0_0.distcp").read_bytes() == b"new"


def test_a_file_system_that_is_not_shared_is_named(tmp_path: Path) -> None:
    aside = archive.fresh_aside(tmp_path, 10)
    files = {"__1_0.distcp": {"bytes": 3, "blake3": "00"}}
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp .* all ranks share"):
        archive.commit(aside, {"step": 10}, files)


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(archive, "FORMAT", archive.FORMAT + 1)
        path = write(tmp_path, 10)
    with pytest.raises(CheckpointError, match="has format 2, this llmtrain reads up to 1"):
        archive.open_checkpoint(path)


def test_locate_takes_a_run_its_checkpoints_or_one_of_them(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    write(directory, 10)
    newest = write(directory, 20)
    assert archive.locate(tmp_path).step == archive.locate(directory).step == 20
    assert archive.locate(newest).step == 20
    assert archive.locate(directory / "step-000000010").step == 10
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run folder"):
        archive.locate(tmp_path / "elsewhere")
