"""Skipped updates, stop signals, and peers that do not answer."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from llmtrain.config.guard import GuardConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.engine.protocol import StepResult
from llmtrain.errors import ConfigError
from llmtrain.run.directory import ExitReason
from llmtrain.run.progress import Progress
from llmtrain.train.events import Kind
from llmtrain.train.guard import Guard, Tell, stop_signals

CPU = torch.device("cpu")


def result(applied: bool, loss: float = 2.0, grad_norm: float = 1.0) -> StepResult:
    return StepResult(
        loss_sum=torch.tensor(4 * loss),
        target_tokens=torch.tensor(4.0),
        grad_norm=torch.tensor(grad_norm),
        applied=torch.tensor(applied),
        metrics={},
    )


def observe(guard: Guard, outcomes: list[bool], num_steps: int = 1000) -> None:
    progress = Progress(num_steps=num_steps, steps=StepSchedule(4, 4))
    for applied in outcomes:
        progress.advance()
        guard.observe(progress, result(applied))


def guarding(
    config: GuardConfig,
    every: int = 1,
    saved: Mapping[str, Any] | None = None,
    tell: Tell | None = None,
) -> Guard:
    return Guard(
        config,
        agree=lambda flag: flag,
        stop_asked=lambda: False,
        device=CPU,
        check_every_steps=every,
        tell=tell,
        saved=saved,
    )


class Run:
    """Feeds losses to a guard as an engine would that heeds its limits."""

    def __init__(self, guard: Guard, step: int = 0) -> None:
        self.guard = guard
        self.progress = Progress(num_steps=1000, steps=StepSchedule(4, 4), step=step)
        self.applied: list[bool] = []

    def go(self, *losses: float, grad_norm: float = 1.0) -> "Run":
        for loss in losses:
            limits = self.guard.limits
            applied = math.isfinite(loss) and bool(
                (limits.max_loss >= loss) & (limits.max_grad_norm >= grad_norm)
            )
            self.progress.advance()
            self.applied.append(applied)
            self.guard.observe(self.progress, result(applied, loss, grad_norm))
        return self


class Told:
    """Events that were told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int | None, str]] = []

    def __call__(self, kind: Kind, text: str, step: int | None = None) -> None:
        self.events.append((kind, step, text))

    @property
    def kinds(self) -> list[tuple[str, int | None]]:
        return [(kind, step) for kind, step, _ in self.events]


def falling(count: int) -> list[float]:
    return [4.0 - 0.01 * step + 0.02 * (-1) ** step for step in range(count)]


def make(max_skipped: int = 3, every: int = 1) -> Guard:
    return guarding(GuardConfig(max_skipped_in_a_row=max_skipped), every)


def test_limits_are_off() -> None:
    limits = make().limits
    assert limits.max_loss.isinf()
    assert limits.max_grad_norm.isinf()


def test_too_many_skipped_updates_in_a_row_stop_the_run(caplog: pytest.LogCaptureFixture) -> None:
    guard = make()
    observe(guard, [True, False, False, False])
    assert guard.stop_requested()
    assert guard.reason is ExitReason.DIVERGED
    assert "3 updates in a row were skipped up to step 4" in caplog.text


def test_skipped_updates_with_good_ones_between_do_not(caplog: pytest.LogCaptureFixture) -> None:
    guard = make()
    with caplog.at_level(logging.WARNING):
        observe(guard, [False, False, True] * 20)
    assert not guard.stop_requested()
    assert caplog.text.count("the update of 1 step was skipped") == 40


@pytest.mark.parametrize("before", range(6))
def test_a_row_is_seen_wherever_the_checks_fall(before: int) -> None:
    guard = make(max_skipped=3, every=4)
    observe(guard, [True] * before + [False] * 3 + [True] * 5)
    assert guard.reason is ExitReason.DIVERGED


def test_the_last_step_is_checked() -> None:
    guard = make(every=100)
    observe(guard, [True, False, False, False], num_steps=4)
    assert guard.reason is ExitReason.DIVERGED


def test_a_row_that_was_reported_does_not_count_again() -> None:
    guard = make(max_skipped=5, every=2)
    observe(guard, [False, False, False, False, True, True, True, True, False, False])
    assert guard.reason is None


def test_the_ranks_agree_and_not_the_local_flag() -> None:
    answers = iter([False, True])
    guard = Guard(agree=lambda flag: next(answers), stop_asked=lambda: True, device=CPU)
    assert not guard.stop_requested()
    assert guard.stop_requested()
    assert guard.reason is ExitReason.PREEMPTED


def test_a_peer_that_does_not_answer_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    def agree(flag: bool) -> bool:
        raise RuntimeError("rank 1 waited 20 s")

    guard = Guard(agree=agree, stop_asked=lambda: True, device=CPU)
    assert guard.stop_requested()
    assert guard.reason is ExitReason.PEER_LOST
    assert "stopping without saving: rank 1 waited 20 s" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_raises_the_flag_and_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts() -> None:
    with stop_signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_install_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter() -> None:
        with stop_signals() as asked:
            seen.append((asked(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


@pytest.mark.parametrize("every", [1, 7, 100])
def test_a_spike_is_one_event_however_long_it_lasts(every: int) -> None:
    told = Told()
    run = Run(guarding(GuardConfig(), every, tell=told))
    run.go(*falling(40), 9.0, 9.0, 9.0, *falling(2)).go(3.8, grad_norm=30.0)
    run.guard.look()
    assert told.kinds == [("spike", 41), ("spike", 46)]
    assert told.events[0][2].startswith("loss 9 is ")
    assert "deviations above the median of the steps before, 3.8" in told.events[0][2]
    assert told.events[0][2].endswith("llmtrain trace run=RUN step=41 names the documents")
    assert told.events[1][2].startswith("gradient norm 30 is ")
    assert all(run.applied)
    assert run.guard.reason is None


def test_nothing_spikes_before_the_tenth_step_or_without_a_score() -> None:
    told = Told()
    Run(guarding(GuardConfig(), tell=told)).go(*falling(9), 90.0)
    Run(guarding(GuardConfig(spike_zscore=None), tell=told)).go(*falling(40), 90.0)
    assert told.kinds == []
    Run(guarding(GuardConfig(), tell=told)).go(*falling(10), 90.0)
    assert told.kinds == [("spike", 11)]


def test_a_spiking_update_is_skipped_and_does_not_move_the_median() -> None:
    told = Told()
    run = Run(guarding(GuardConfig(on_spike=("skip",), max_skipped_in_a_row=4), 5, tell=told))
    run.go(*falling(40), 9.0, 9.0, 9.0, *falling(42)[40:], math.nan)
    assert [step for step, applied in enumerate(run.applied, 1) if not applied] == [41, 42, 43, 46]
    run.guard.look()
    assert told.kinds == [("spike", 41), ("skipped_step", 43), ("skipped_step", 46)]
    assert "the updates of 3 steps from 41 to 43 were skipped" in told.events[1][2]
    run.go(9.0, 9.0, 9.0)
    run.guard.look()
    assert run.guard.reason is ExitReason.DIVERGED
    assert run.guard.why.startswith("4 updates in a row were skipped up to step 49")


@pytest.mark.parametrize("every", [1, 4, 50])
def test_where_to_go_back_to_does_not_depend_on_when_the_host_looks(every: int) -> None:
    run = Run(guarding(GuardConfig(on_spike=("rollback",)), every)).go(*falling(40), 9.0, 3.6, 9.0)
    assert run.guard.look() is False
    assert run.guard.reason is ExitReason.ROLLED_BACK
    assert run.guard.rollback is not None
    assert (run.guard.rollback.first, run.guard.rollback.last) == (41, 41)
    config = GuardConfig(on_spike=("skip", "rollback"), max_skipped_in_a_row=3)
    run = Run(guarding(config, every)).go(*falling(40), 9.0, 3.6, *[9.0] * 5, 3.6)
    run.guard.look()
    assert run.guard.rollback is not None
    assert (run.guard.rollback.first, run.guard.rollback.last) == (43, 45)


def test_what_is_not_finite_is_rolled_back_or_stops_the_run() -> None:
    config = GuardConfig(on_spike=("rollback",), max_rollbacks=2)
    run = Run(guarding(config)).go(3.0, math.nan)
    assert run.guard.rollback is not None
    assert run.guard.rollback.why == "step 2: loss or gradient norm was not finite"
    saved = {**run.guard.to_plain(), "rolled_back_to": [1, 1]}
    run = Run(guarding(config, saved=saved)).go(3.0, math.nan)
    assert run.guard.reason is ExitReason.DIVERGED
    assert "gone back 2 times, to steps 1, 1" in run.guard.why


@pytest.mark.parametrize("stop", [3, 12, 41, 43])
@pytest.mark.parametrize(
    "config",
    [
        GuardConfig(on_spike=("skip",), max_skipped_in_a_row=5, spike_window_steps=12),
        GuardConfig(on_spike=("skip", "rollback"), max_skipped_in_a_row=5),
        GuardConfig(max_skipped_in_a_row=3),
    ],
    ids=lambda config: "-".join(config.on_spike),
)
def test_a_resumed_run_decides_as_one_that_never_stopped(stop: int, config: GuardConfig) -> None:
    losses = [*falling(40), 9.0, 9.0, 9.0, math.nan, math.nan, 3.5, 9.0]
    straight, resumed = Told(), Told()
    whole = Run(guarding(config, 100, tell=straight)).go(*losses)
    whole.guard.look()
    first = Run(guarding(config, 100, tell=resumed)).go(*losses[:stop])
    assert first.guard.look()
    saved = json.loads(json.dumps(first.guard.to_plain()))
    second = Run(guarding(config, 100, saved, tell=resumed), stop).go(*losses[stop:])
    second.guard.look()
    assert first.applied + second.applied == whole.applied
    assert second.guard.to_plain() == whole.guard.to_plain()
    assert (second.guard.reason, second.guard.rollback) == (
        whole.guard.reason, whole.guard.rollback,
    )  # fmt: skip
    spikes = [[one for one in told.kinds if one[0] == "spike"] for told in (straight, resumed)]
    assert spikes[0] == spikes[1] != []


def test_a_look_before_a_save_sees_steps_that_are_not_due() -> None:
    guard = guarding(GuardConfig(on_spike=("rollback",)), every=1000)
    run = Run(guard).go(*falling(20))
    assert guard.look()
    run.go(9.0)
    assert guard.reason is None
    assert not guard.look()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"on_spike": ("rollback", "skip")}, "on_spike=[rollback,skip] is not known; use one of "),
        ({"on_spike": ("skip",), "spike_zscore": None}, "spike_zscore=null finds no spikes for "),
        ({"max_rollbacks": 0}, "max_rollbacks=0 must be at least 1"),
        ({"spike_window_steps": 9}, "spike_window_steps=9 must be at least 10"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        GuardConfig(**fields)
    assert problem in str(refused.value)
