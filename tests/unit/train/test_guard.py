"""Skipped updates, stop signals, and peers that do not answer."""

import logging
import os
import signal
import threading

import pytest
import torch

from llmtrain.config.ramp import StepSchedule
from llmtrain.engine.protocol import StepResult
from llmtrain.train.guard import Guard, stop_signals
from llmtrain.train.progress import Progress
from llmtrain.train.rundir import ExitReason

CPU = torch.device("cpu")


def result(applied: bool) -> StepResult:
    return StepResult(
        loss_sum=torch.tensor(8.0),
        target_tokens=torch.tensor(4.0),
        grad_norm=torch.tensor(1.0),
        applied=torch.tensor(applied),
        metrics={},
    )


def observe(guard: Guard, outcomes: list[bool], num_steps: int = 1000) -> None:
    progress = Progress(num_steps=num_steps, steps=StepSchedule(4, 4))
    for applied in outcomes:
        progress.advance()
        guard.observe(progress, result(applied))


def make(max_skipped: int = 3, every: int = 1) -> Guard:
    return Guard(
        agree=lambda flag: flag,
        stop_asked=lambda: False,
        device=CPU,
        check_every_steps=every,
        max_skipped_in_a_row=max_skipped,
    )


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
    assert "2 updates in a row skipped up to step 2" in caplog.text


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
