"""Batches on their way to the device: what is copied, when, and what the loop waited."""

import time
from dataclasses import replace

import pytest
import torch

from llmtrain.data.batch import StepBatch
from llmtrain.data.synthetic import BatchShape, synthetic_batch
from llmtrain.train.feed import Copies, Feed

SHAPE = BatchShape(rows=4, sequence_length=8, vocab_size=31)
CPU = torch.device("cpu")


class Source:
    """Batches that take a quarter of a second; each has been started as a reader thread does."""

    def __init__(self, copies: Copies, now: list[float]) -> None:
        self.copies = copies
        self.now = now

    def at(self, step: int) -> StepBatch:
        self.now[0] += 0.25
        return self.copies.start(synthetic_batch(SHAPE, seed=0, step=step))


def test_on_the_cpu_a_batch_is_not_copied() -> None:
    copies = Copies(CPU)
    batch = synthetic_batch(SHAPE, seed=0, step=0)
    assert copies.finish(copies.start(batch)) is batch


def test_what_the_loop_waited_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, now = Copies(CPU), [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    feed = Feed(Source(copies, now), copies)
    for step in range(3):
        feed.at(step)
        now[0] += 7.0  # the step
    assert feed.waited_s == 3 * 0.25


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_run_beside_a_long_kernel_and_arrive_whole() -> None:
    device = torch.device("cuda", 0)
    copies = Copies(device)
    feed = Feed(Source(copies, [0.0]), copies)
    want = [synthetic_batch(SHAPE, seed=0, step=step) for step in range(20)]
    torch.cuda.synchronize()
    sums = []
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(20):
            batch = feed.at(step)
            batch = replace(batch, row_ids=None)
            torch.cuda._sleep(1_000_000)
            sums.append(batch.tokens.sum())
            del batch
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    assert [int(s) for s in sums] == [int(b.tokens.sum()) for b in want]
