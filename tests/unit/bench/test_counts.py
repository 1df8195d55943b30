"""Closed forms of work against counting it out."""

import pytest
import torch

from llmtrain.bench.batches import bench_batch, document_lengths
from llmtrain.bench.counts import least_work, visible_pairs
from llmtrain.config.bench import BenchConfig
from llmtrain.config.load import load
from llmtrain.ops.attention.spec import AttentionSpec
from llmtrain.planner.flops import flops_per_token


def config(*words: str) -> BenchConfig:
    return load(
        "bench",
        ["model=llama_demo", "training.sequence_length=64", "training.global_batch_tokens=256",
         *words],
        BenchConfig,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("documents", ["packed", "whole"])
def test_pairs_are_those_of_the_mask(documents: str, window: int | None) -> None:
    batch = bench_batch(config(f"documents={documents}"), 1)
    spec = AttentionSpec.within(batch.positions, batch.document_ids, window)
    lengths = document_lengths([batch])
    assert sum(length * count for length, count in lengths.items()) == batch.tokens.numel()
    assert visible_pairs(lengths, window) == int(spec.mask.sum())


def test_every_token_but_the_last_of_a_document_has_the_next_as_target() -> None:
    batch = bench_batch(config(), 0)
    last = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    assert torch.equal(batch.targets[:, :-1] < 0, last)
    kept = batch.targets[:, :-1] >= 0
    assert torch.equal(batch.targets[:, :-1][kept], batch.tokens[:, 1:][kept])
    assert torch.equal(batch.loss_weight > 0, batch.targets >= 0)


def test_products_add_up_to_the_operations_of_the_convention() -> None:
    settings, tokens = config("documents=whole"), 256
    work = least_work(settings, visible_pairs({64: 4}), tokens)
    total = sum(part.flops for part in work.values())
    # the convention's causal half counts s^2 / 2 pairs, the mask's diagonal makes it s (s + 1) / 2
    expected = flops_per_token(settings.model, 64, causal=True) * tokens
    extra = work["attention"].flops / 65
    assert total - extra == pytest.approx(expected)


def test_bytes_of_the_update_follow_optimizer_and_precision() -> None:
    adamw = least_work(config(), 0, 1)["optimizer"].bytes_moved
    lion = least_work(config("optimizer=lion"), 0, 1)["optimizer"].bytes_moved
    bf16 = least_work(config("engine.precision=bf16"), 0, 1)["optimizer"].bytes_moved
    assert lion / adamw == pytest.approx(20 / 28)
    assert bf16 / adamw == pytest.approx(30 / 28)
