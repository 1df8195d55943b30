"""Save and restore in one process, and what happens when the disk is full."""

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import CheckpointConfig
from llmtrain.errors import CheckpointError
from llmtrain.train import archive
from llmtrain.train.checkpoint import Checkpoints, load_model_weights
from llmtrain.train.progress import Progress

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
    config = CheckpointConfig(every_steps=every_steps, keep_last=2)
    return Checkpoints(path, config, state, facts=facts, carried=lambda: {"wandb_id": "abc"})


def at(step: int, num_steps: int = 100) -> Progress:
    return Progress(num_steps=num_steps, steps=StepSchedule(64, 64), step=step)


def test_a_restored_state_is_bitwise_the_saved_one(tmp_path: Path) -> None:
    saved, other = State(1), State(2)
    assert make(tmp_path, saved).save(at(10))
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
    make(tmp_path, State(1)).save(at(10))
    meta = archive.locate(tmp_path).meta
    assert (meta["step"], meta["tokens"], meta["world_size"]) == (10, 640, 1)
    assert meta["facts"] == FACTS
    assert meta["carried"] == {"wandb_id": "abc"}


def test_weights_are_read_without_a_process_group(tmp_path: Path) -> None:
    state = State(1)
    make(tmp_path / "checkpoints", state).save(at(10))
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
    written = archive.locate(tmp_path).path.stat().st_mtime_ns
    assert checkpoints.save(at(10))
    assert archive.locate(tmp_path).path.stat().st_mtime_ns == written


def test_old_checkpoints_are_retired(tmp_path: Path) -> None:
    checkpoints = make(tmp_path, State(1))
    for step in (5, 10, 15):
        checkpoints.save(at(step))
    assert [step for step, _ in archive.scan(tmp_path)] == [15, 10]


def test_other_data_is_refused_and_named(tmp_path: Path) -> None:
    make(tmp_path, State(1)).save(at(10))
    other = make(tmp_path, State(1), facts={**FACTS, "training.seed": "7"})
    with pytest.raises(CheckpointError, match=r"another run: training\.seed was 0 and is 7; put"):
        other.restore(at(0))


def test_another_model_is_refused_and_named(tmp_path: Path) -> None:
    make(tmp_path, State(1)).save(at(10))
    with pytest.raises(
        CheckpointError,
        match=r"2 tensors differ, the first is model\.embed\.weight, of shape \(5, 3\) in the "
        r"checkpoint and \(5, 4\)",
    ):
        make(tmp_path, State(1, width=4)).restore(at(0))


def test_a_damaged_newest_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = State(1), State(2)
    make(tmp_path, older).save(at(5))
    make(tmp_path, newer).save(at(10))
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
    with files_of_at_most(room):
        assert not checkpoints.save(at(10))
    assert "the checkpoint of step 10 was not written (rank 0: " in caplog.text
    assert "File too large" in caplog.text
    assert archive.locate(tmp_path).step == 5
    assert checkpoints.save(at(15))
    assert [step for step, _ in archive.scan(tmp_path)] == [15, 5]
    assert not list(tmp_path.glob(".tmp-*"))
