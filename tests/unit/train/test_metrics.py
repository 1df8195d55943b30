"""Rows of numbers: sums over steps and sources, rates, and nothing that JSON cannot hold."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.model import ModelConfig
from llmtrain.config.ramp import LengthStage, StepSchedule
from llmtrain.data.batch import StepBatch
from llmtrain.data.held_out import EvaluationBatches
from llmtrain.engine.protocol import StepResult
from llmtrain.planner.flops import flops_per_token
from llmtrain.run.progress import Progress
from llmtrain.train.evaluation import Evaluation
from llmtrain.train.feed import Copies, Feed
from llmtrain.train.metrics import Meter, Metrics, Row
from tests.stores import write_store

CPU = torch.device("cpu")
NAN = float("nan")
MODEL = ModelConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def make_batch() -> StepBatch:
    ids = torch.zeros(1, 2, dtype=torch.int64)
    return StepBatch(
        tokens=ids,
        targets=ids,
        positions=ids.int(),
        document_ids=ids.int(),
        loss_weight=torch.ones(1, 2),
        source_ids=torch.zeros(1, dtype=torch.int32),
        num_microbatches=1,
    )


def result(
    loss: tuple[float, float], tokens: tuple[float, float] = (3, 1), applied: bool = True
) -> StepResult:
    return StepResult(
        loss_sum=torch.tensor(sum(loss)),
        target_tokens=torch.tensor(float(sum(tokens))),
        grad_norm=torch.tensor(loss[0]),
        applied=torch.tensor(applied),
        metrics={"source_loss_sum": torch.tensor(loss), "source_tokens": torch.tensor(tokens)},
    )


class Rows:
    """A sink that keeps rows and a batch source that takes its time."""

    def __init__(self, every_steps: int = 2, num_steps: int = 100) -> None:
        self.rows: list[Row] = []
        self.batches = Feed(self, Copies(CPU))
        steps = StepSchedule(8, 8, length_ramp=(LengthStage(until_tokens=8, sequence_length=4),))
        self.progress = Progress(num_steps=num_steps, steps=steps)
        meter = Meter(model=MODEL, peak_flops=1e12, device=CPU)
        self.metrics = Metrics(
            [self],
            meter,
            schedule=lambda tokens: tokens / 1000,
            source_names=("web", "code"),
            batches=self.batches,
            batch_hash="{:016x}".format,
            every_steps=every_steps,
        )

    def write(self, row: Row) -> None:
        json.dumps(row, allow_nan=False)
        self.rows.append(row)

    def at(self, step: int) -> StepBatch:
        time.sleep(0.002)
        return make_batch()

    def step(self, outcome: StepResult) -> None:
        self.batches.at(self.progress.step)
        self.progress.advance()
        self.metrics.after_step(self.progress, outcome)


def test_loss_is_cross_entropy_and_z_loss_is_apart() -> None:
    run = Rows(every_steps=2)
    for _ in range(2):
        outcome = result((6.0, 2.0))
        metrics = {**outcome.metrics, "z_loss_sum": torch.tensor(1.0)}
        run.step(replace(outcome, loss_sum=outcome.loss_sum + 1, metrics=metrics))
    assert (run.rows[0]["loss"], run.rows[0]["z_loss"]) == (2.0, 0.25)


def test_a_row_sums_the_steps_since_the_last_row() -> None:
    run = Rows(every_steps=2)
    run.step(result((6.0, 2.0)))
    assert not run.rows
    run.step(result((3.0, 1.0), tokens=(1, 1)))
    row = run.rows[0]
    assert row["loss"] == pytest.approx(12 / 6)
    assert "z_loss" not in row
    assert row["source_loss"] == pytest.approx({"web": 9 / 4, "code": 3 / 2})
    assert row["source_tokens"] == {"web": 4, "code": 2}
    assert (row["step"], row["tokens"], row["lr"]) == (2, 16, 0.016)
    assert row["grad_norm"] == 3.0
    run.step(result((0.0, 0.0)))
    run.step(result((0.0, 0.0)))
    assert run.rows[1]["loss"] == 0.0


def test_the_contract_of_a_row() -> None:
    run = Rows(every_steps=1)
    run.step(result((1.0, 1.0)))
    assert set(run.rows[0]) == {
        "step", "num_steps", "batch_hash", "tokens", "loss", "grad_norm", "lr", "sequence_length",
        "tokens_per_s", "mfu", "mfu_causal", "mfu_convention", "memory_bytes", "step_time_s",
        "data_wait_s", "skipped_steps", "source_loss", "source_tokens", "time",
    }  # fmt: skip


def test_rates_are_wall_clock_and_name_their_convention() -> None:
    run = Rows(every_steps=2)
    run.step(result((1.0, 1.0)))
    run.step(result((1.0, 1.0)))
    row = run.rows[0]
    assert 0.002 <= row["data_wait_s"] <= row["step_time_s"]
    assert row["tokens_per_s"] == pytest.approx(8 / row["step_time_s"])
    assert row["sequence_length"] == 8
    # the first step had rows of 4 tokens
    for name, causal in (("mfu", False), ("mfu_causal", True)):
        costs = [flops_per_token(MODEL, length, causal=causal) for length in (4, 8)]
        assert row[name] == pytest.approx(row["tokens_per_s"] * sum(costs) / 2 / 1e12)
    assert row["mfu_convention"] == "6(N - N_embedding) + 12 L d s, full attention"
    assert row["memory_bytes"] > 10_000_000


def test_without_a_known_peak_there_is_no_mfu() -> None:
    meter = Meter(model=MODEL, peak_flops=None, device=CPU)
    assert meter.utilization({8: 5}, 1.0)["mfu"] is None


def test_a_skipped_step_counts_as_skipped_and_not_as_loss() -> None:
    run = Rows(every_steps=2)
    run.step(result((NAN, NAN), applied=False))
    run.step(result((3.0, 1.0)))
    row = run.rows[0]
    assert (row["loss"], row["skipped_steps"]) == (1.0, 1)
    assert row["source_loss"] == {"web": 1.0, "code": 1.0}


def test_numbers_that_are_not_finite_become_null() -> None:
    run = Rows(every_steps=1)
    run.step(result((NAN, NAN), applied=False))
    assert (run.rows[0]["loss"], run.rows[0]["grad_norm"]) == (None, None)


def test_a_source_without_targets_has_no_loss() -> None:
    run = Rows(every_steps=1)
    run.step(result((2.0, 0.0), tokens=(2, 0)))
    assert run.rows[0]["source_loss"] == {"web": 1.0}
    assert run.rows[0]["source_tokens"] == {"web": 2, "code": 0}


def test_the_last_step_always_makes_a_row() -> None:
    run = Rows(every_steps=100, num_steps=3)
    for _ in range(3):
        run.step(result((1.0, 1.0)))
    assert [row["step"] for row in run.rows] == [3]


class Evaluator:
    """Gives every target of a batch a loss of its source's index + 1."""

    def eval_step(self, batch: StepBatch) -> StepResult:
        counts = [int(batch.loss_weight[batch.source_ids == i].sum()) for i in (0, 1)]
        return result((counts[0], 2 * counts[1]), tokens=(counts[0], counts[1]), applied=False)


def test_evaluation_scores_every_held_out_target_and_lands_in_the_row(tmp_path: Path) -> None:
    stores = {
        "code": write_store(tmp_path / "code", [[5] * 4]),  # shorter than a window
        "web": write_store(tmp_path / "web", [[5] * 11, [6] * 8]),
    }
    batches = EvaluationBatches(stores, sequence_length=8, micro_batch_size=2)
    run = Rows(every_steps=100)
    evaluation = Evaluation(
        Evaluator(), batches, torch.device("cpu"), every_steps=2, report=run.metrics.add
    )
    for _ in range(4):
        run.progress.advance()
        outcome = result((1.0, 1.0))
        evaluation.after_step(run.progress, outcome)
        run.metrics.after_step(run.progress, outcome)
    assert [row["step"] for row in run.rows] == [2, 4]
    for row in run.rows:
        assert row["validation_loss"] == {"code": 1.0, "web": 2.0}
        assert row["validation_tokens"] == {"code": 4, "web": 11 + 8}
    assert evaluation.scores(3) == {}
    assert evaluation.scores(4) == {
        "validation_loss": (4 * 1.0 + 19 * 2.0) / 23,
        "validation_loss/code": 1.0,
        "validation_loss/web": 2.0,
    }


def test_an_evaluation_is_left_off_when_the_run_is_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stores = {"web": write_store(tmp_path / "web", [[5] * 40])}
    batches = EvaluationBatches(stores, sequence_length=8, micro_batch_size=1)
    answers = iter([False, True])

    @contextmanager
    def pause() -> Iterator[Callable[[], bool]]:
        yield lambda: next(answers)

    run = Rows(every_steps=100)
    evaluation = Evaluation(
        Evaluator(), batches, torch.device("cpu"), every_steps=1, report=run.metrics.add,
        pause=pause,
    )  # fmt: skip
    run.progress.advance()
    evaluation.after_step(run.progress, result((1.0, 1.0)))
    run.metrics.after_step(run.progress, result((1.0, 1.0)))
    assert evaluation.scores(1) == {}
    assert run.rows == []
    assert caplog.messages == ["step 1: evaluation left off, the run stops or goes back"]


def test_the_time_of_an_evaluation_is_not_step_time() -> None:
    run = Rows(every_steps=1)
    run.progress.advance()
    time.sleep(0.05)
    fields: Mapping[str, Any] = {"validation_loss": {"web": 1.0}}
    run.metrics.add(fields, took_s=0.05)
    run.metrics.after_step(run.progress, result((1.0, 1.0)))
    assert run.rows[0]["step_time_s"] < 0.04


def test_sums_stay_on_the_device_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Rows(every_steps=100)

    def wait(self: Tensor) -> Any:
        raise AssertionError("the host waited for the device")

    outcome = result((1.0, 1.0))
    for name in ("item", "tolist", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, wait)
    run.step(outcome)
    run.step(outcome)
