"""The loop with a real engine and real checkpoints: order, ends, and exact resume."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import archive
from llmtrain.checkpoint.checkpoints import Checkpoints
from llmtrain.config.guard import GuardConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import CheckpointConfig, OptimizerConfig, ScheduleConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import synthetic_batch
from llmtrain.engine.protocol import StepResult
from llmtrain.optim.schedule import learning_rate
from llmtrain.parallel.place import Place
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train.guard import Guard
from llmtrain.train.loop import GarbageCollection, train
from tests.distributed.layouts import SHAPE, SINGLE
from tests.distributed.rig import Rig, rig
from tests.unit.checkpoint.test_checkpoints import files_of_at_most

NUM_STEPS = 6
TOKENS = 64


class Run:
    """One process' life of a run in ``folder``."""

    def __init__(self, r: Rig, folder: Path, stop_at_step: int | None = None) -> None:
        self.r = r
        self.engine = r.engine
        self.progress = Progress(
            num_steps=NUM_STEPS, steps=StepSchedule(TOKENS, TOKENS), stop_at_step=stop_at_step
        )
        config = CheckpointConfig(every_steps=2)
        self.checkpoints = Checkpoints(folder, config, r.engine, facts={"seed": "0"})
        self.pulled: list[int] = []
        self.losses: dict[int, float] = {}
        self.signal_after: int | None = None

    def at(self, step: int) -> StepBatch:
        self.pulled.append(step)
        return synthetic_batch(SHAPE, seed=3, step=step)

    def after_step(self, progress: Progress, result: StepResult) -> None:
        self.losses[progress.step] = (result.loss_sum / result.target_tokens).item()

    def asked(self) -> bool:
        return self.signal_after is not None and self.progress.step >= self.signal_after

    def go(self) -> ExitReason:
        schedule = ScheduleConfig(warmup_tokens=TOKENS)
        guard = Guard(
            GuardConfig(max_skipped_in_a_row=3),
            agree=self.r.world.agree,
            stop_asked=self.asked,
            device=self.r.world.device,
            check_every_steps=1,
        )
        return train(
            self.engine,
            self,
            progress=self.progress,
            schedule=learning_rate(OptimizerConfig(lr=1e-2), schedule, NUM_STEPS * TOKENS),
            guard=guard,
            checkpoints=self.checkpoints,
            hooks=[self],
        )


@pytest.fixture
def r() -> Iterator[Rig]:
    with rig(Place(), SINGLE.config) as made:
        yield made


def saved(folder: Path) -> list[int]:
    return sorted(step for step, _ in archive.scan(folder))


def test_a_run_pulls_each_batch_once_and_saves_at_the_interval(r: Rig, tmp_path: Path) -> None:
    run = Run(r, tmp_path)
    assert run.go() is ExitReason.DONE
    assert run.pulled == list(range(NUM_STEPS))
    assert list(run.losses) == list(range(1, NUM_STEPS + 1))
    assert saved(tmp_path) == [2, 4, 6]


def test_stopped_and_resumed_is_bitwise_the_straight_run(r: Rig, tmp_path: Path) -> None:
    straight = Run(r, tmp_path / "straight")
    straight.go()
    expected = r.engine.full_parameters()

    with rig(Place(), SINGLE.config) as first:
        stopped = Run(first, tmp_path / "stopped", stop_at_step=3)
        assert stopped.go() is ExitReason.STOP_AT_STEP
        assert saved(tmp_path / "stopped") == [2, 3]
    with rig(Place(), SINGLE.config) as second:
        resumed = Run(second, tmp_path / "stopped")
        assert resumed.checkpoints.restore(resumed.progress)
        assert resumed.go() is ExitReason.DONE
        assert resumed.pulled == [3, 4, 5]
        assert {**stopped.losses, **resumed.losses} == straight.losses
        found = second.engine.full_parameters()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_stop_request_saves_the_step_it_was_agreed_at(r: Rig, tmp_path: Path) -> None:
    run = Run(r, tmp_path)
    run.signal_after = 3
    assert run.go() is ExitReason.PREEMPTED
    assert run.progress.step == 3
    assert saved(tmp_path) == [2, 3]


def test_a_finished_run_does_nothing_more(r: Rig, tmp_path: Path) -> None:
    Run(r, tmp_path).go()
    again = Run(r, tmp_path)
    again.checkpoints.restore(again.progress)
    assert again.go() is ExitReason.DONE
    assert again.pulled == []


def test_a_failed_last_save_is_no_success(r: Rig, tmp_path: Path) -> None:
    run = Run(r, tmp_path)
    with files_of_at_most(1000):
        assert run.go() is ExitReason.SAVE_FAILED
    assert run.progress.step == NUM_STEPS


def test_a_failed_save_on_the_way_does_not_end_the_run(r: Rig, tmp_path: Path) -> None:
    run = Run(r, tmp_path, stop_at_step=3)
    with files_of_at_most(1000):
        run.go()
    run.progress.stop_at_step = None
    assert run.go() is ExitReason.DONE
    assert saved(tmp_path) == [4, 6]


def test_divergence_ends_the_run_without_a_save(r: Rig, tmp_path: Path) -> None:
    with torch.no_grad():
        ((_, weight),) = r.engine.state_dict()["model.model.norm.weight"].chunks
        weight.fill_(float("nan"))
    run = Run(r, tmp_path)
    run.checkpoints = Checkpoints(tmp_path, CheckpointConfig(), r.engine, facts={})
    assert run.go() is ExitReason.DIVERGED
    assert run.progress.step == 3
    assert saved(tmp_path) == []


def test_garbage_is_collected_at_fixed_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[int] = []
    progress = Progress(num_steps=10, steps=StepSchedule(1, 1))
    nothing = torch.zeros(())
    result = StepResult(
        loss_sum=nothing, target_tokens=nothing, grad_norm=nothing, applied=nothing, metrics={}
    )
    with GarbageCollection(every_steps=4) as hook:
        assert not gc.isenabled()
        monkeypatch.setattr(gc, "collect", lambda generation: collected.append(progress.step))
        while not progress.finished:
            progress.advance()
            hook.after_step(progress, result)
    assert gc.isenabled()
    assert collected == [4, 8]
