"""Losses of documents from losses of tokens, at the chosen steps and at no other."""

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.engine import EngineConfig
from llmtrain.config.parallel import ParallelConfig
from llmtrain.config.ramp import StepSchedule
from llmtrain.config.training import MonitorConfig
from llmtrain.data.batch import StepBatch
from llmtrain.data.document_loss import read_document_losses
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.engine.protocol import StepResult
from llmtrain.errors import ConfigError
from llmtrain.parallel.mesh import World
from llmtrain.parallel.place import Place
from llmtrain.run.progress import Progress
from llmtrain.train.document_losses import DocumentLosses

SOURCES = ("code", "web")
SHAPE = BatchShape(rows=6, sequence_length=12, vocab_size=31)
EVERY_THIRD = MonitorConfig(document_loss_every_steps=3, document_loss_steps=(1, 6))
ZERO = torch.zeros(())
RESULT = StepResult(
    loss_sum=ZERO, target_tokens=ZERO, grad_norm=ZERO, applied=ZERO.bool(), metrics={}
)


class Batches:
    def at(self, step: int) -> StepBatch:
        return replace(synthetic_batch(SHAPE, seed=4, step=step), num_microbatches=3)


class Run:
    """Steps of a run in one process whose losses are drawn."""

    def __init__(self, folder: Path) -> None:
        world = World(ParallelConfig(), EngineConfig(device="cpu"), Place())
        self.losses = DocumentLosses(folder, world, SOURCES, EVERY_THIRD)
        self.batches = self.losses.asking(Batches())
        self.progress = Progress(num_steps=9, steps=StepSchedule(12, 72))

    def step(self, spoil: tuple[int, int] | None = None) -> tuple[StepBatch, Tensor]:
        """Take a step; the token ``spoil`` has no finite loss."""
        batch = self.batches.at(self.progress.step)
        drawn = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
        if spoil is not None:
            drawn[spoil] = math.nan
        for losses, part in zip(drawn.chunk(3), batch.microbatches(), strict=True):
            if part.row_ids is not None:
                self.losses.observe(losses, part)
        self.progress.advance()
        self.losses.after_step(self.progress, RESULT)
        return batch, drawn


def by_hand(batch: StepBatch, losses: Tensor) -> dict[tuple[int, int], tuple[str, float, float]]:
    """Source, targets and mean loss by row and document."""
    sums: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in range(SHAPE.rows):
        for place in range(SHAPE.sequence_length):
            weight = batch.loss_weight[row, place].item()
            if weight > 0:
                entry = sums[row, int(batch.document_ids[row, place])]
                entry[0] += weight
                entry[1] += weight * losses[row, place].item()
    return {
        key: (SOURCES[int(batch.source_ids[key[0]])], n, total / n)
        for key, (n, total) in sums.items()
    }


def test_every_document_of_a_chosen_step_has_its_mean(tmp_path: Path) -> None:
    run = Run(tmp_path)
    steps = {number: run.step() for number in range(1, 7)}
    for number, (batch, losses) in steps.items():
        found = read_document_losses(tmp_path, number)
        assert (found is None) == (number not in (1, 3, 6))
        if found is not None:
            got = {(x.row, x.document): (x.source, x.targets, x.loss) for x in found}
            want = by_hand(batch, losses)
            assert list(got) == sorted(want)
            for place, (source, targets, loss) in want.items():
                assert got[place] == (source, targets, pytest.approx(loss, rel=1e-12))


def test_a_loss_that_is_not_finite_is_null(tmp_path: Path) -> None:
    run = Run(tmp_path)
    batch = synthetic_batch(SHAPE, seed=4, step=0)
    row, place = (int(i) for i in batch.loss_weight.nonzero()[0])
    run.step(spoil=(row, place))
    found = read_document_losses(tmp_path, 1) or ()
    spoilt = [(x.row, x.document) for x in found if x.loss is None]
    assert spoilt == [(row, int(batch.document_ids[row, place]))]


def test_other_steps_ask_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.step()

    def wait(self: Tensor, *_: Any) -> Any:
        raise AssertionError("the host waited for the device")

    for name in ("item", "tolist", "cpu", "__bool__"):
        monkeypatch.setattr(Tensor, name, wait)
    batch, _ = run.step()
    assert batch.row_ids is None


def test_steps_count_from_one() -> None:
    with pytest.raises(ConfigError, match=r"document_loss_steps\.1=0 must be at least 1"):
        MonitorConfig(document_loss_steps=(4, 0))
    with pytest.raises(ConfigError, match="document_loss_every_steps=0"):
        MonitorConfig(document_loss_every_steps=0)
