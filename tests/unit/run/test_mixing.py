"""Decisions of an adaptive mixture along a run."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch

from llmtrain.config.ramp import StepSchedule
from llmtrain.data.adaptive import AdaptiveSchedule, Exp3
from llmtrain.data.journal import Journal, Skip
from llmtrain.data.mixture import Mixture
from llmtrain.data.order import ConcatOrder
from llmtrain.data.plan import BatchPlan
from llmtrain.engine.protocol import StepResult
from llmtrain.run.mixing import Mixing
from llmtrain.run.progress import Progress
from tests.stores import random_documents, write_store

RULE = Exp3(interval=16, learning_rate=0.5, exploration=0.2, loss_scale=10.0)
HALVES = (Fraction(1, 2), Fraction(1, 2))
UNITS = 4


def plan_skipping(folder: Path, *skips: Skip) -> BatchPlan:
    """Steps of four windows of two sources."""
    orders = {
        name: ConcatOrder(write_store(folder / name, random_documents(20, 20, seed)), name,
                          seed=0, window_tokens=8)
        for seed, name in enumerate("ab")
    }  # fmt: skip
    mixture = Mixture(AdaptiveSchedule(RULE, HALVES))
    steps = StepSchedule(8, UNITS * 8)
    return BatchPlan(orders, mixture, steps, seed=0, journal=Journal(skips=skips))


def train(plan: BatchPlan, mixing: Mixing, first: int, end: int) -> list[str]:
    """Take the steps [first, end); returns the hashes of their batches."""
    steps = StepSchedule(8, UNITS * 8)
    progress = Progress(num_steps=end, steps=steps, stop_at_step=None)
    hashes = []
    for step in range(first, end):
        hashes.append(plan.batch_hash(step))
        progress.step = step + 1
        losses, targets = torch.tensor([5.0 + step, 90.0]), torch.tensor([20.0, 20.0])
        result = StepResult(
            loss_sum=losses.sum(), target_tokens=targets.sum(), grad_norm=torch.tensor(1.0),
            applied=torch.tensor(True),
            metrics={"source_loss_sum": losses, "source_tokens": targets},
        )  # fmt: skip
        mixing.after_step(progress, result)
    mixing.settle()
    return hashes


def test_whole_intervals_may_be_left_out_from_the_first_step_on(tmp_path: Path) -> None:
    plan = plan_skipping(tmp_path, Skip(0, 5 * RULE.interval))
    train(plan, Mixing(plan), 0, 3)
    assert plan.windows(3).sources.tolist()


def test_whole_intervals_left_out_later_give_what_a_run_has_that_knew(tmp_path: Path) -> None:
    skip = Skip(10, 5 * RULE.interval)
    knew = plan_skipping(tmp_path / "knew", skip)
    whole = train(knew, Mixing(knew), 0, 20)
    asked = plan_skipping(tmp_path / "asked")
    assert train(asked, Mixing(asked), 0, 10) == whole[:10]
    resumed = plan_skipping(tmp_path / "resumed", skip)
    mixing = Mixing(resumed)
    resumed.adopt(replace(asked.journal, skips=(skip,)))
    mixing.resume(10)
    assert train(resumed, mixing, 10, 20) == whole[10:]
    assert resumed.journal == knew.journal
