"""Save and restore in one process, and what happens when the disk is full."""

import logging
import resource
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from llmtrain.checkpoint import archive, tensor_files
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.checkpoint.restore import load_model_weights, load_tensors
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.run.progress import Progress

FACTS = {"data": "blake3 of the data", "training.seed": "0"}


class State:
    """Named tensors that a checkpoint saves and loads in place."""

    def __init__(self, seed: int, width: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            "model.embed.weight": torch.randn(5, width, generator=generator),
            "optim.embed.weight.exp_avg": torch.randn(5, width, generator=generator),
            "optim.step": torch.tensor(float(seed)),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.tensors = dict(state)


def make(
    path: Path, state: State, *, facts: Mapping[str, str] = FACTS, every_steps: int = 5
) -> Checkpoints:
    return make_with(path, state, CheckpointConfig(every_steps=every_steps, keep_last=2), facts)


def make_with(
    path: Path, state: State, config: CheckpointConfig, facts: Mapping[str, str] = FACTS
) -> Checkpoints:
    return Checkpoints(path, config, state, facts=facts, carried=lambda: {"wandb_id": "abc"})


def at(step: int, num_steps: int = 100) -> Progress:
    return Progress(num_steps=num_steps, steps=StepSchedule(64, 64), step=step)


def save(path: Path, state: State, step: int) -> None:
    """Save one step in the background and wait for it."""
    checkpoints = make(path, state)
    checkpoints.save(at(step))
    assert checkpoints.wait()


def test_a_restored_state_is_bitwise_the_saved_one(tmp_path: Path) -> None:
    saved, other = State(1), State(2)
    checkpoints = make(tmp_path, saved)
    assert checkpoints.save(at(10))
    assert checkpoints.wait()
    progress = at(0)
    assert make(tmp_path, other).restore(progress)
    assert progress.step == 10
    for name, tensor in saved.tensors.items():
        assert torch.equal(other.tensors[name], tensor), name


def test_nothing_to_restore(tmp_path: Path) -> None:
    progress = at(0)
    assert not make(tmp_path, State(1)).restore(progress)
    assert progress.step == 0


def test_meta_tells_what_the_checkpoint_is(tmp_path: Path) -> None:
    save(tmp_path, State(1), 10)
    meta = archive.locate(tmp_path).meta
    assert (meta["step"], meta["tokens"], meta["world_size"]) == (10, 640, 1)
    assert meta["facts"] == FACTS
    assert meta["carried"] == {"wandb_id": "abc"}


def test_weights_are_read_without_a_process_group(tmp_path: Path) -> None:
    state = State(1)
    save(tmp_path / "checkpoints", state, 10)
    weights = load_model_weights(tmp_path)
    assert list(weights) == ["embed.weight"]
    assert torch.equal(weights["embed.weight"], state.tensors["model.embed.weight"])


def test_due_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, State(1), every_steps=5)
    due = [step for step in range(1, 13) if checkpoints.due(at(step, num_steps=12))]
    assert due == [5, 10, 12]


def test_saving_a_step_again_writes_it_once(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, State(1))
    checkpoints.save(at(10))
    checkpoints.wait()
    written = archive.locate(tmp_path).path.stat().st_mtime_ns
    assert checkpoints.save(at(10))
    assert checkpoints.wait()
    assert archive.locate(tmp_path).path.stat().st_mtime_ns == written


def test_old_checkpoints_are_retired(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, State(1))
    for step in (5, 10, 15):
        checkpoints.save(at(step))
    assert checkpoints.wait()
    assert [step for step, _ in archive.scan(tmp_path)] == [15, 10]


def test_other_data_is_refused_and_named(tmp_path: Path) -> None:
    save(tmp_path, State(1), 10)
    other = make(tmp_path, State(1), facts={**FACTS, "training.seed": "7"})
    with pytest.raises(CheckpointError, match=r"another run: training\.seed was 0 and is 7; put"):
        other.restore(at(0))


def test_another_model_is_refused_and_named(tmp_path: Path) -> None:
    save(tmp_path, State(1), 10)
    with pytest.raises(
        CheckpointError,
        match=r"2 tensors differ, the first is model\.embed\.weight, of shape \(5, 3\) in the "
        r"checkpoint and \(5, 4\)",
    ):
        make(tmp_path, State(1, width=4)).restore(at(0))


def test_a_damaged_newest_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = State(1), State(2)
    save(tmp_path, older, 5)
    save(tmp_path, newer, 10)
    data = next(archive.locate(tmp_path).path.glob("__0_*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    progress, state = at(0), State(3)
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path, state).restore(progress)
    assert progress.step == 5
    assert torch.equal(state.tensors["optim.step"], torch.tensor(1.0))
    assert f"{data.name} does not match its checksum" in caplog.text
    assert "falling back to the one before, step-000000005" in caplog.text


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1000, 4096])
def test_a_full_disk_leaves_the_run_and_the_older_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    state = State(1, width=500)
    checkpoints = make(tmp_path, state)
    assert checkpoints.save(at(5))
    assert checkpoints.wait()
    with files_of_at_most(room):
        assert checkpoints.save(at(10))
        assert not checkpoints.wait()
    assert "the checkpoint of step 10 was not written (rank 0: " in caplog.text
    assert "File too large" in caplog.text
    assert archive.locate(tmp_path).step == 5
    assert checkpoints.save(at(15))
    assert checkpoints.wait()
    assert [step for step, _ in archive.scan(tmp_path)] == [15, 5]
    assert not list(tmp_path.glob(".tmp-*"))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, as small as said."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_file_system_keeps_the_old_ones_and_takes_new_ones_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    state = State(1, width=20_000)  # 800 kB
    with small_disk(tmp_path / "disk", "2M") as disk:
        config = CheckpointConfig(keep_last=3, asynchronous=asynchronous)
        checkpoints = make_with(disk / "checkpoints", state, config)
        for step in (1, 2, 3):
            checkpoints.save(at(step))
        assert not checkpoints.wait()
        assert caplog.text.count("the checkpoint of step 3 was not written (No space left on ") == 1
        whole = [
            archive.open_checkpoint(path).step for _, path in archive.scan(disk / "checkpoints")
        ]
        assert whole == [2, 1]
        assert not list((disk / "checkpoints").glob(".*"))
        archive.remove(disk / "checkpoints" / archive.folder_name(1))
        checkpoints.save(at(4))
        assert checkpoints.wait()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_saved_is_the_state_at_the_call(tmp_path: Path, asynchronous: bool) -> None:
    state = State(1, width=500)
    expected = {name: tensor.clone() for name, tensor in state.tensors.items()}
    checkpoints = make_with(tmp_path, state, CheckpointConfig(asynchronous=asynchronous))
    checkpoints.save(at(1))
    for tensor in state.tensors.values():
        tensor.zero_()
    assert checkpoints.wait()
    found = load_tensors(archive.locate(tmp_path).path)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_save_waits_for_the_one_before_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = make(tmp_path, State(1))
    checkpoints.save(at(0))
    assert checkpoints.wait()
    write = tensor_files.write_bytes

    def slowly(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        time.sleep(0.1)
        return write(path, parts)

    monkeypatch.setattr(tensor_files, "write_bytes", slowly)
    started = time.perf_counter()
    assert checkpoints.save(at(5))
    assert time.perf_counter() - started < 0.1
    assert checkpoints.save(at(10))
    assert time.perf_counter() - started > 0.1
    assert "the save of step 5 is still being written: training waits for it" in caplog.text
    assert checkpoints.wait()
    assert [step for step, _ in archive.scan(tmp_path)] == [10, 5]
    assert checkpoints.stalled_s > 0.1


def test_a_failing_run_lets_a_save_in_flight_end(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, State(1, width=5000))
    checkpoints.save(at(5))
    checkpoints.close()
    assert archive.locate(tmp_path).step == 5


def test_without_memory_for_a_copy_saves_are_synchronous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr("llmtrain.checkpoint.writer.Staging", refuse)
    checkpoints = make(tmp_path, State(1))
    checkpoints.save(at(5))
    assert archive.locate(tmp_path).step == 5
    assert "training will stand still for saves" in caplog.text


def test_torch_itself_reads_what_is_written(tmp_path: Path) -> None:
    state = State(1)
    state.tensors |= {
        "half": torch.randn(3, 7).bfloat16(), "double": torch.randn(2, dtype=torch.float64),
        "strided": torch.randn(4, 6).T, "count": torch.arange(5),
    }  # fmt: skip
    save(tmp_path, state, 1)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=archive.locate(tmp_path).path, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.tensors.items())
